// Building elements. Text goes in as text, never as markup: what a model or an expert says is not trusted.

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

export function smallButton(label, act) {
  const button = element("button", { type: "button", className: "small", textContent: label });
  button.addEventListener("click", act);
  return button;
}

// A button that copies what `text()` gives and says so for a moment.
export function copyButton(text) {
  const button = smallButton("Copy", () => copyAndTell(button, text()));
  return button;
}

export async function copyAndTell(button, text) {
  let told = "Copied";
  try {
    await copy(text);
  } catch {
    told = "Not allowed";
  }
  button.textContent = told;
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Over plain HTTP from another machine browsers offer no clipboard; this old way still works.
  const place = element("textarea", { value: text, className: "unseen" });
  (document.querySelector("dialog[open]") ?? document.body).append(place);
  place.select();
  const copied = document.execCommand("copy");
  place.remove();
  if (!copied) throw new Error("copying is not allowed");
}
