// The pictures that wait to be sent: dropped, pasted or chosen, each with a button to take it away.

import { byId, element } from "./dom.js";

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif"];

export class Pictures {
  #waiting = []; // of {name, url}
  #reading = 0; // how many batches of files
  #complain;

  // `complain` is told of files that are no pictures, or cannot be read.
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

  get isReading() {
    return this.#reading > 0;
  }

  putBack(pictures) {
    this.#waiting.unshift(...pictures);
    this.#show();
  }

  take() {
    const taken = this.#waiting;
    this.#waiting = [];
    this.#show();
    return taken;
  }

  async add(files) {
    const [right, wrong] = parted([...files], (file) => KINDS.includes(file.type));
    this.#reading++;
    const read = await Promise.all(right.map(async (file) => ({ name: file.name, url: await dataUrl(file) })));
    this.#reading--;
    const [whole, unread] = parted(read, (picture) => picture.url !== null);
    this.#waiting.push(...whole);
    this.#show();
    const complaints = [];
    if (wrong.length) complaints.push(`${names(wrong)}: only PNG, JPEG, WebP and GIF pictures.`);
    if (unread.length) complaints.push(`${names(unread)}: cannot be read.`);
    if (complaints.length) this.#complain(complaints.join(" "));
  }

  #paste(event) {
    const files = event.clipboardData?.files ?? [];
    if (!files.length || isOfTable(event.clipboardData) || document.querySelector("dialog[open]")) return;
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

const names = (things) => things.map((thing) => thing.name).join(", ");

// Spreadsheets put a picture of the cells beside their text. A copied picture has its address as HTML at most, a
// copied file its name as text.
const isOfTable = (data) => data.types.includes("text/html") && data.types.includes("text/plain");

function parted(things, belongs) {
  return [things.filter(belongs), things.filter((thing) => !belongs(thing))];
}

// Null where the file cannot be read.
function dataUrl(file) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.addEventListener("loadend", () => resolve(reader.result));
    reader.readAsDataURL(file);
  });
}
