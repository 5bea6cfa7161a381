// One answer as it comes: what the experts read, the text, and how fast it was.

import { element, smallButton } from "./dom.js";
import { showReadable } from "./text.js";

const OUTCOMES = {
  empty: "found nothing",
  failed: "failed",
  timeout: "took too long",
  skipped: "is left alone for a while after failures",
};

export const NO_TEXT = "No text: the next request leaves this turn out.";

export class Answer {
  failed = false;
  #text = "";
  #drawing = 0;
  #begun = 0;
  #first = 0;
  #last = 0;
  #pieces = 0;
  #usage = null;
  #finish = null;
  #onChange;

  // showRequest()    shows as code what was asked
  // onChange()       its node has changed
  constructor(body, showRequest, onChange) {
    this.#onChange = onChange;
    this.experts = element("div");
    this.text = element("div", { className: "text waiting" });
    this.meta = element("span");
    this.foot = element("footer", {}, this.meta, smallButton("Request", showRequest));
    const name = element("h2", { textContent: body.model });
    const label = { className: "answer", "aria-label": `Answer of ${body.model}` };
    this.node = element("article", label, name, this.experts, this.text, this.foot);
  }

  // What it said, unless it failed: that is no answer.
  get said() {
    return this.failed ? "" : this.#text;
  }

  restart() {
    this.#begun = performance.now();
  }

  take(chunk) {
    this.#drawing ||= requestAnimationFrame(() => this.#draw());
    if (chunk.experts?.length) this.experts.replaceChildren(expertsView(chunk.experts));
    if (chunk.usage) this.#usage = chunk.usage;
    const choice = chunk.choices[0];
    this.#finish = choice?.finish_reason ?? this.#finish;
    if (!choice?.delta.content) return;
    this.#last = performance.now();
    this.#first ||= this.#last;
    this.#pieces += 1;
    this.#text += choice.delta.content;
  }

  // `how` says why it ended where the server does not.
  end(how = null) {
    this.text.classList.remove("waiting");
    if (!this.#text) this.text.append(element("p", { className: "quiet", textContent: NO_TEXT }));
    this.#draw(how ?? this.#ending());
  }

  // `ways` out of it: what each button's click does, by its label.
  fail(message, ways) {
    this.failed = true;
    this.text.classList.remove("waiting");
    const buttons = Object.entries(ways).map(([label, act]) => smallButton(label, act));
    this.text.after(element("div", { className: "error", role: "alert" }, element("p", { textContent: message }), ...buttons));
    this.#draw();
  }

  #draw(ending = null) {
    cancelAnimationFrame(this.#drawing);
    this.#drawing = 0;
    if (this.#text) showReadable(this.text, this.#text);
    this.meta.textContent = this.#measures(ending).join(" · ");
    this.#onChange();
  }

  #measures(ending) {
    if (this.failed) return [];
    const tokens = this.#usage?.completion_tokens ?? this.#pieces;
    const seconds = (this.#last - this.#first) / 1000;
    const measures = [];
    if (tokens) measures.push(`${this.#usage ? "" : "≈ "}${tokens} ${tokens === 1 ? "token" : "tokens"}`);
    if (tokens > 1 && seconds > 0) measures.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    if (this.#first) measures.push(`first after ${((this.#first - this.#begun) / 1000).toFixed(2)} s`);
    if (this.#usage) measures.push(`prompt of ${this.#usage.prompt_tokens}`);
    if (ending) measures.push(ending);
    return measures;
  }

  #ending() {
    return this.#finish === "length" ? "cut off at max tokens" : null;
  }
}

function expertsView(reports) {
  const severalPictures = reports.some((report) => report.image > 0);
  const list = element("dl");
  for (const report of reports) {
    const where = severalPictures ? `, picture ${report.image + 1}` : "";
    const time = element("span", { className: "quiet", textContent: ` ${report.seconds.toFixed(2)} s${where}` });
    list.append(element("dt", {}, report.name, time));
    if (report.outcome === "ok") list.append(element("dd", { textContent: report.text }));
    else list.append(element("dd", { className: "quiet", textContent: OUTCOMES[report.outcome] ?? report.outcome }));
  }
  const summary = element("summary", { textContent: "What the experts read" });
  return element("details", { className: "experts", open: true }, summary, list);
}
