// Speaks to the server that served this page. The key lives in this module and, on request, in the tab's
// session storage.

const ROOT = new URL(".", document.baseURI);
const STORED_KEY = "llama-adapter-key";

let key = ofStorage((storage) => storage.getItem(STORED_KEY)) ?? "";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // 0: the server was not reached, or broke off; null: an error amid the answer
  }
}

// What may stand in a header; anything else makes `fetch` fail as if there was no server.
export const canBeKey = (text) => /^[\x20-\x7e]*$/.test(text);

export const keyIsSet = () => key !== "";

export function setKey(value, keep) {
  key = value;
  ofStorage((storage) => (keep && value ? storage.setItem(STORED_KEY, value) : storage.removeItem(STORED_KEY)));
}

// Browsers may refuse the storage, by their settings or in a frame.
function ofStorage(work) {
  try {
    return work(sessionStorage);
  } catch {
    return null;
  }
}

export const address = (path) => new URL(path, ROOT).href;

export async function getJson(path) {
  const response = await ask(path, {});
  try {
    return await response.json();
  } catch {
    throw foreign();
  }
}

// The objects of a list, each with its id.
export async function getList(path) {
  const list = (await getJson(path))?.data;
  if (!Array.isArray(list) || list.some((item) => typeof item?.id !== "string")) throw foreign();
  return list;
}

// Something between here and the server answered, or the server broke off.
const foreign = () => new ApiError("What answers is not this server, or it broke off.", 0);

// The chunks of a streamed chat completion. Aborting `signal` throws its AbortError.
export async function* chatChunks(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, null); // its status is gone with the head
    yield chunk;
  }
  throw new ApiError("The server broke off before the answer was complete.", 0);
}

async function ask(path, options) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await reached(fetch(address(path), { ...options, headers, cache: "no-store" }));
  if (!response.ok) throw new ApiError(await reason(response), response.status);
  return response;
}

// What the network says of a failure differs between browsers and tells nobody anything.
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

// The data of each server-sent event.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reached(reader.read());
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      if (event.startsWith("data: ")) yield event.slice("data: ".length);
    }
  }
}
