// A model's text for reading: paragraphs, fenced code blocks, `code` and **bold**, the rest as it stands.

import { copyButton, element } from "./dom.js";

// Shows `text` in `view`. Nodes it has in common with what is there stay, as a selection, the focus or a click
// under way may be in them: all but the last, mostly, while a text grows.
export function showReadable(view, text) {
  const old = [...view.childNodes];
  const made = [...readable(text).childNodes];
  let kept = 0;
  while (kept < Math.min(old.length, made.length) && saysTheSame(old[kept], made[kept])) kept++;
  for (const node of old.slice(kept)) node.remove();
  view.append(...made.slice(kept));
}

// Of a block the code alone counts: its button says for a moment that it copied.
function saysTheSame(one, other) {
  const [a, b] = [one, other].map((node) => node.querySelector("pre") ?? node);
  return a.isEqualNode(b);
}

export function readable(text) {
  const fragment = new DocumentFragment();
  let plain = [];
  let code = null;
  const endPlain = () => {
    const paragraphs = plain.join("\n").split(/\n[ \t]*\n/).map((text) => text.replace(/^\n+|\s+$/g, ""));
    fragment.append(...paragraphs.filter((text) => text !== "").map(paragraph));
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
  const nodes = text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((piece, i) => {
    if (i % 2 === 0) return piece;
    if (piece.startsWith("`")) return element("code", { textContent: piece.slice(1, -1) });
    return element("strong", { textContent: piece.slice(2, -2) });
  });
  return element("p", {}, ...nodes);
}

function block(text) {
  const pre = element("pre", { tabIndex: 0 }, element("code", { textContent: text }));
  return element("div", { className: "code" }, pre, copyButton(() => text));
}
