// A model's text for reading: fenced code blocks and `code`, everything else as it stands.

import { copyButton, element } from "./dom.js";

export function readable(text) {
  const fragment = new DocumentFragment();
  let plain = [];
  let code = null;
  const endPlain = () => {
    const joined = plain.join("\n");
    if (joined.trim()) fragment.append(paragraph(joined));
    plain = [];
  };
  for (const line of text.split("\n")) {
    const isFence = /^\s*```/.test(line);
    if (code === null && isFence) {
      endPlain();
      code = [];
    } else if (code !== null && isFence) {
      fragment.append(block(code.join("\n")));
      code = null;
    } else {
      (code ?? plain).push(line);
    }
  }
  endPlain();
  if (code?.length) fragment.append(block(code.join("\n"))); // not closed yet
  return fragment;
}

function paragraph(text) {
  const pieces = text.replace(/^\n+|\n+$/g, "").split(/`([^`\n]+)`/);
  const nodes = pieces.map((piece, i) => (i % 2 ? element("code", { textContent: piece }) : piece));
  return element("p", {}, ...nodes);
}

function block(text) {
  const pre = element("pre", { tabIndex: 0 }, element("code", { textContent: text }));
  return element("div", { className: "code" }, pre, copyButton(() => text));
}
