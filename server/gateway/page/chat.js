// The conversation: what was said so far, and the answer that is being streamed.

import { ApiError, chatChunks } from "./api.js";
import { Answer, NO_TEXT } from "./answer.js";
import { byId, element } from "./dom.js";
import { Follower } from "./follower.js";

export class Chat {
  #turns = []; // as they are shown and sent, of {text, pictures, question, answer}
  #follower = new Follower(byId("conversation"));
  #running = null; // the AbortController of the answer that is being streamed
  #options;

  // settings()             what a request asks for beside its messages
  // withKey(work)          runs `work`, again once a key was given where the server asks for one
  // showRequest(body)      shows a request as code
  // onEdit(text, pictures) a question that failed is to be written anew
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
    for (const turn of [...this.#turns]) this.#drop(turn);
    byId("spoken").textContent = "";
  }

  send(text, pictures) {
    return this.#ask({ text, pictures, question: question(text, pictures) });
  }

  // What is asked becomes the last turn.
  async #ask(asked) {
    const body = {
      ...this.#options.settings(),
      messages: [...this.#turns.flatMap(said), userMessage(asked)],
      stream: true,
      stream_options: { include_usage: true },
    };
    const running = new AbortController();
    const answer = new Answer(body, () => this.#options.showRequest(body), () => this.#follower.follow());
    const turn = { ...asked, answer };
    this.#append(turn);
    this.#begin(running);
    try {
      await this.#options.withKey(() => this.#stream(body, running.signal, answer));
      answer.end();
    } catch (error) {
      if (error.name === "AbortError") answer.end("stopped");
      else this.#fail(turn, error);
    } finally {
      this.#end(running);
    }
    const wasCleared = !answer.node.isConnected;
    if (!answer.failed && !wasCleared) byId("spoken").textContent = answer.said || NO_TEXT;
  }

  #append(turn) {
    byId("welcome").hidden = true;
    this.#turns.push(turn);
    byId("conversation").append(turn.question, turn.answer.node);
    this.#follower.toEnd();
  }

  #drop(turn) {
    this.#turns = this.#turns.filter((other) => other !== turn);
    turn.question.remove();
    turn.answer.node.remove();
    byId("welcome").hidden = this.#turns.length > 0;
  }

  async #stream(body, signal, answer) {
    answer.restart();
    for await (const chunk of chatChunks(body, signal)) answer.take(chunk);
  }

  #fail(turn, error) {
    if (!(error instanceof ApiError)) console.error(error);
    const askAgain = () => {
      if (this.isRunning) return;
      this.#drop(turn);
      this.#ask(turn);
    };
    const edit = () => {
      this.#drop(turn);
      this.#options.onEdit(turn.text, turn.pictures);
    };
    turn.answer.fail(error.message, { "Try again": askAgain, Edit: edit });
    if (error.status === 0 || error.status === 503) this.#options.onUnavailable();
  }

  #begin(running) {
    this.#running = running;
    byId("spoken").textContent = ""; // an answer is read out once it is whole
    this.#options.onChange(true);
  }

  #end(running) {
    if (this.#running !== running) return;
    this.#running = null;
    this.#options.onChange(false);
  }
}

// What the next requests tell of a turn: both halves or nothing, for chat templates want them to alternate.
function said(turn) {
  const answer = turn.answer.said;
  return answer ? [userMessage(turn), { role: "assistant", content: answer }] : [];
}

function userMessage({ text, pictures }) {
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
