// Puts the page together: the server's state, its models and experts, the controls, the dialogs.

import { ApiError, address, canBeKey, getJson, getList, keyIsSet, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { byId, copyAndTell, element } from "./dom.js";
import { adapterView, baseView } from "./gates.js";
import { Pictures } from "./pictures.js";
import { abbreviated, asCurl, asPython } from "./snippets.js";

const RETRY_MS = 2000;
const WRONG_KEY = "This is no key: it holds a character, maybe an invisible one, beyond the letters, digits and signs of ASCII.";

let models = [];
let isReady = false;

const chat = new Chat({ settings, withKey, showRequest, onEdit: edit, onChange: showRunning, onUnavailable: becomeReady });
const pictures = new Pictures(tell);

// The server

let becoming = null;

// Asks until the server is ready, then for what it has. One such loop runs at a time.
function becomeReady() {
  becoming ??= untilReady().finally(() => (becoming = null));
  return becoming;
}

async function untilReady() {
  isReady = false;
  for (;;) {
    try {
      await getJson("health/ready");
      await withKey(showWhatIsServed);
      break;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401) return tell("The server wants an API key: give one under API key.");
      tell(`The server is not ready. ${error.message} Trying again…`);
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
  isReady = true;
  tell("");
}

async function showWhatIsServed() {
  const [listed, experts] = await Promise.all([getList("v1/models"), getList("v1/experts")]);
  models = listed;
  showModels();
  showExperts(experts.map((expert) => expert.id));
  await showAdapter();
}

function tell(message) {
  // Written anew it would be read out anew.
  if (byId("notice").textContent !== message) byId("notice").textContent = message;
  byId("notice").hidden = !message;
}

// Models and experts

function showModels() {
  const chosen = byId("model").value;
  const options = models.map((model) => {
    const about = [model.variant, model.reads_images ? "sees pictures" : ""].filter(Boolean).join(", ");
    return element("option", { value: model.id, textContent: about ? `${model.id} (${about})` : model.id });
  });
  byId("model").replaceChildren(...options);
  if (models.some((model) => model.id === chosen)) byId("model").value = chosen;
  byId("model").disabled = false;
}

const currentModel = () => models.find((model) => model.id === byId("model").value);

async function showAdapter() {
  const model = currentModel();
  if (!model) return;
  const view = model.parent === null ? baseView(model) : await gatesView(model);
  if (model === currentModel()) byId("adapter").replaceChildren(...view);
}

async function gatesView(model) {
  try {
    return adapterView(model, await getJson(`v1/adapters/${encodeURIComponent(model.id)}/gates`));
  } catch (error) {
    return [element("p", { className: "quiet", textContent: error.message })];
  }
}

function showExperts(names) {
  const off = new Set(expertBoxes().filter((box) => !box.checked).map((box) => box.value));
  const boxes = names.map((name) => {
    const box = element("input", { type: "checkbox", value: name, checked: !off.has(name) });
    return element("label", { className: "check" }, box, name);
  });
  const legend = byId("experts").querySelector("legend");
  const none = element("p", { className: "quiet", textContent: "This server has none." });
  byId("experts").replaceChildren(legend, ...(boxes.length ? boxes : [none]));
}

const expertBoxes = () => [...byId("experts").querySelectorAll("input")];

// What a request asks for beside its messages. All experts are the server's own default.
function settings() {
  const asked = { model: byId("model").value };
  for (const input of byId("sampling").querySelectorAll("input")) {
    if (input.value !== "") asked[input.name] = Number(input.value);
  }
  const boxes = expertBoxes();
  const on = boxes.filter((box) => box.checked).map((box) => box.value);
  // As the server's own default: the adapter `caption` does not hear itself.
  if (on.length < boxes.length) asked.experts = on.filter((name) => !(name === "caption" && asked.model === name));
  return asked;
}

// Sending and stopping

function send() {
  const text = byId("question").value.trim();
  if (chat.isRunning || !(text || pictures.count || pictures.isReading)) return;
  if (!isReady) {
    // Then it goes by itself, unless somebody writes on meanwhile.
    becomeReady().then(() => isReady && byId("question").value.trim() === text && send());
    return;
  }
  if (pictures.isReading) {
    tell("A picture is still being read. Send again in a moment.");
    return;
  }
  tell("");
  byId("question").value = "";
  chat.send(text, pictures.take());
}

// Puts a question back, before what was written since.
function edit(text, images) {
  const question = byId("question");
  question.value = [text, question.value].filter(Boolean).join("\n");
  pictures.putBack(images);
  question.focus();
}

// Enter sends, but not where it ends a composition (Safari says so by its code alone), nor on a keyboard on
// the screen, which has no Shift+Enter to break the line.
function sends(event) {
  const isComposing = event.isComposing || event.keyCode === 229;
  return event.key === "Enter" && !event.shiftKey && !isComposing && !matchMedia("(hover: none)").matches;
}

function showRunning(isRunning) {
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  if (hadFocus) byId("question").focus();
}

// The key

async function withKey(work) {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (error.status !== 401 || !(await askForKey(error.message))) throw error;
    }
  }
}

let asking = null; // one dialog for all who need a key

function askForKey(reason) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-reason").textContent = reason;
    byId("key").value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
    dialog.showModal();
  }).finally(() => (asking = null));
  return asking;
}

function takeKey(event) {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!canBeKey(key)) {
    byId("key-reason").textContent = WRONG_KEY;
    byId("key").select();
    return;
  }
  setKey(key, byId("keep-key").checked);
  byId("key").value = "";
  byId("key-dialog").close("given");
}

async function changeKey() {
  if (await askForKey("Sent with each request as a bearer token.")) becomeReady();
}

// The request as code

let shown = null;

const asCode = {
  curl: (body) => asCurl(address("v1/chat/completions"), body, keyIsSet()),
  python: (body) => asPython(address("v1"), body, keyIsSet()),
};
let language = "curl";

function showRequest(body) {
  shown = body;
  showSnippet();
  byId("request-dialog").showModal();
}

function showSnippet() {
  const short = abbreviated(shown);
  byId("snippet").textContent = asCode[language](short);
  byId("snippet-note").hidden = JSON.stringify(short) === JSON.stringify(shown);
  byId("as-curl").setAttribute("aria-pressed", String(language === "curl"));
  byId("as-python").setAttribute("aria-pressed", String(language === "python"));
}

function write(name) {
  language = name;
  showSnippet();
}

// The panel, which narrow screens show on demand

function showPanel(isOpen) {
  document.body.classList.toggle("panel-open", isOpen);
  byId("toggle-panel").setAttribute("aria-expanded", String(isOpen));
}

const panelIsOpen = () => document.body.classList.contains("panel-open");

function onEscape() {
  if (document.querySelector("dialog[open]")) return; // it closes itself
  if (chat.isRunning) chat.stop();
  else if (panelIsOpen()) {
    showPanel(false);
    byId("toggle-panel").focus();
  }
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("question").addEventListener("keydown", (event) => {
    if (!sends(event)) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && onEscape());
  byId("stop").addEventListener("click", () => chat.stop());
  byId("new-chat").addEventListener("click", () => {
    chat.clear();
    showPanel(false);
    byId("question").focus();
  });
  byId("model").addEventListener("change", showAdapter);
  byId("toggle-panel").addEventListener("click", () => showPanel(!panelIsOpen()));
  byId("change-key").addEventListener("click", changeKey);
  byId("key-dialog").querySelector("form").addEventListener("submit", takeKey);
  byId("as-curl").addEventListener("click", () => write("curl"));
  byId("as-python").addEventListener("click", () => write("python"));
  byId("copy-snippet").addEventListener("click", () => copyAndTell(byId("copy-snippet"), asCode[language](shown)));
  for (const button of document.querySelectorAll("dialog .close")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
}

listen();
becomeReady();
if (matchMedia("(hover: hover)").matches) byId("question").focus(); // not where it opens a keyboard
