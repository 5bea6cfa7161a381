// The pictures that wait to be sent: dropped, pasted or chosen, each with a button to take it away.

import { byId, element } from "./dom.js";

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif"];

export class Pictures {
  #waiting = []; // of {name, url}
  #complain;

  // `complain` is told of files that are no pictures.
  constructor(complain) {
    this.#complain = complain;
    byId("attach").addEventListener("click", () => byId("files").click());
    byId("files").addEventListener("change", (event) => {
      this.add(event.target.files);
      event.target.value = ""; // so that the same file can be chosen again
    });
    document.addEventListener("paste", (event) => this.#paste(event));
    this.#listenForDrops();
  }

  get count() {
    return this.#waiting.length;
  }

  take() {
    const taken = this.#waiting;
    this.#waiting = [];
    this.#show();
    return taken;
  }

  async add(files) {
    const wrong = [...files].filter((file) => !KINDS.includes(file.type));
    if (wrong.length) {
      this.#complain(`${wrong.map((file) => file.name).join(", ")}: only PNG, JPEG, WebP and GIF pictures.`);
    }
    const right = [...files].filter((file) => KINDS.includes(file.type));
    const read = await Promise.all(right.map(async (file) => ({ name: file.name, url: await dataUrl(file) })));
    this.#waiting.push(...read);
    this.#show();
  }

  #paste(event) {
    const files = event.clipboardData?.files ?? [];
    if (!files.length || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    this.add(files);
  }

  #listenForDrops() {
    const isFiles = (event) => event.dataTransfer?.types.includes("Files");
    const curtain = byId("drop-here");
    document.addEventListener("dragover", (event) => {
      if (!isFiles(event)) return;
      event.preventDefault();
      curtain.hidden = false;
    });
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) curtain.hidden = true;
    });
    document.addEventListener("drop", (event) => {
      curtain.hidden = true;
      if (!isFiles(event)) return;
      event.preventDefault();
      this.add(event.dataTransfer.files);
    });
  }

  #show() {
    const items = this.#waiting.map((picture) => {
      const label = `Remove ${picture.name}`;
      const remove = element("button", { type: "button", textContent: "×", "aria-label": label, title: label });
      remove.addEventListener("click", () => {
        this.#waiting = this.#waiting.filter((other) => other !== picture);
        this.#show();
        byId("question").focus();
      });
      return element("li", {}, element("img", { src: picture.url, alt: picture.name }), remove);
    });
    byId("pictures").replaceChildren(...items);
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
