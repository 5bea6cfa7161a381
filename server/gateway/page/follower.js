// Keeps the end of a view in sight as it grows, until the user scrolls up, and again once they are back there.

export class Follower {
  #view;
  #follows = true;
  #top = 0; // where the view was last seen

  constructor(view) {
    this.#view = view;
    view.addEventListener("scroll", () => this.#look());
    view.addEventListener("load", () => this.follow(), true); // a picture has its height only then
  }

  // Call after each change of what is in the view.
  follow() {
    this.#look(); // the user may have scrolled without that the browser told of it yet
    if (this.#follows) this.toEnd();
  }

  // Wherever the user is.
  toEnd() {
    this.#follows = true;
    this.#view.scrollTop = this.#view.scrollHeight;
    this.#top = this.#view.scrollTop;
  }

  #look() {
    const { scrollTop, scrollHeight, clientHeight } = this.#view;
    const isAtEnd = scrollHeight - scrollTop - clientHeight <= 1; // browsers round
    this.#follows = isAtEnd || (this.#follows && scrollTop >= this.#top);
    this.#top = scrollTop;
  }
}
