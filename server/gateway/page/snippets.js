// A request as a command line and as a program. Keys stay out: both read OPENAI_API_KEY.

const PYTHON_CLIENT_FIELDS = ["model", "messages", "temperature", "top_p", "max_tokens", "seed", "stream", "stream_options"];

// `address` is of the route. Of a document's lines none can be the word that ends it: strings have no
// line breaks in JSON.
export function asCurl(address, body, withKey) {
  const key = withKey ? ' \\\n  -H "authorization: Bearer $OPENAI_API_KEY"' : "";
  const json = JSON.stringify(body, null, 2);
  return `curl --no-buffer '${address}' \\\n  -H 'content-type: application/json'${key} \\\n  --data-binary @- <<'JSON'\n${json}\nJSON\n`;
}

// For OpenAI's client. `base` is the address that ends in /v1.
export function asPython(base, body, withKey) {
  const entries = Object.entries(body);
  const own = entries.filter(([name]) => PYTHON_CLIENT_FIELDS.includes(name));
  const other = entries.filter(([name]) => !PYTHON_CLIENT_FIELDS.includes(name));
  if (other.length) own.push(["extra_body", Object.fromEntries(other)]);
  const fields = own.map(([name, value]) => `    ${name}=${literal(value, "    ")},\n`).join("");
  return `${withKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${literal(base)}, api_key=${withKey ? 'os.environ["OPENAI_API_KEY"]' : '"none"'})
stream = client.chat.completions.create(
${fields})
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
print()
`;
}

// The same body with its pictures cut short, for showing.
export function abbreviated(body) {
  return JSON.parse(JSON.stringify(body), (_, value) =>
    typeof value === "string" && value.startsWith("data:") && value.length > 100
      ? `${value.slice(0, 40)}… (${Math.ceil(value.length / 1024)} KiB)`
      : value,
  );
}

// A JSON value as Python writes it. JSON's string literals are Python's too.
function literal(value, indent = "") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const [open, close] = isList ? "[]" : "{}";
  const inner = `${indent}    `;
  const items = isList
    ? value.map((item) => literal(item, inner))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, inner)}`);
  const line = open + items.join(", ") + close;
  if (line.length <= 60 && !line.includes("\n")) return line;
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}
