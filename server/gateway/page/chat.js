// The conversation: what was said so far, and the answer that is being streamed.

import { ApiError, chatChunks } from "./api.js";
import { Answer } from "./answer.js";
import { byId, element } from "./dom.js";

export class Chat {
  #messages = [];
  #running = null; // the AbortController of the answer that is being streamed
  #options;

  // settings()             what a request asks for beside its messages
  // withKey(work)          runs `work`, again once a key was given where the server asks for one
  // showRequest(body)      shows a request as code
  // onChange(isRunning)    an answer begins or ends
  // onUnavailable()        the server could not be reached, or is not ready
  constructor(options) {
    this.#options = options;
  }

  get isRunning() {
    return this.#running !== null;
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    this.#messages = [];
    byId("conversation").querySelectorAll("article").forEach((turn) => turn.remove());
    byId("welcome").hidden = false;
  }

  async send(text, pictures) {
    byId("welcome").hidden = true;
    byId("conversation").append(question(text, pictures));
    await this.#ask(userMessage(text, pictures));
  }

  async #ask(message) {
    const messages = [...this.#messages, message];
    const body = {
      ...this.#options.settings(),
      messages,
      stream: true,
      stream_options: { include_usage: true },
    };
    const running = new AbortController();
    const answer = new Answer(body, () => this.#options.showRequest(body));
    byId("conversation").append(answer.node);
    answer.node.scrollIntoView({ block: "end" });
    this.#begin(running);
    try {
      await this.#options.withKey(() => this.#stream(body, running.signal, answer));
      answer.end();
    } catch (error) {
      if (error.name === "AbortError") answer.end("stopped");
      else this.#fail(answer, message, error);
    } finally {
      this.#end(running);
    }
    // A question that failed is no part of what the next request tells.
    const wasCleared = !answer.node.isConnected;
    if (!answer.failed && !wasCleared) this.#messages = [...messages, ...answer.messages];
  }

  async #stream(body, signal, answer) {
    answer.restart();
    for await (const chunk of chatChunks(body, signal)) answer.take(chunk);
  }

  #fail(answer, message, error) {
    if (!(error instanceof ApiError)) console.error(error);
    answer.fail(error.message, () => {
      if (this.isRunning) return;
      answer.node.remove();
      this.#ask(message);
    });
    if (error.status === 0 || error.status === 503) this.#options.onUnavailable();
  }

  #begin(running) {
    this.#running = running;
    byId("conversation").setAttribute("aria-busy", "true"); // read out once it is whole
    this.#options.onChange(true);
  }

  #end(running) {
    if (this.#running !== running) return;
    this.#running = null;
    byId("conversation").removeAttribute("aria-busy");
    this.#options.onChange(false);
  }
}

function userMessage(text, pictures) {
  if (!pictures.length) return { role: "user", content: text };
  const images = pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } }));
  return { role: "user", content: [...(text ? [{ type: "text", text }] : []), ...images] };
}

function question(text, pictures) {
  const images = pictures.map((picture) => element("img", { src: picture.url, alt: picture.name }));
  return element(
    "article",
    { className: "question", "aria-label": "You" },
    ...(images.length ? [element("div", { className: "shown" }, ...images)] : []),
    ...(text ? [element("p", { textContent: text })] : []),
  );
}
