// The adapter: what it is, and how strongly each layer and head hears its prompts, as a heat map.

import { element } from "./dom.js";

const number = new Intl.NumberFormat("en");
const value = (gate) => (gate === 0 ? "0" : gate.toPrecision(2));

// `model` is a model object of the API, `gates` what /v1/adapters/{id}/gates says of it.
export function adapterView(model, gates) {
  return [facts(model, gates), ...heatMap(gates)];
}

export function baseView(model) {
  return [element("p", { className: "quiet", textContent: `${model.id} is the base itself: no adapter, no gates.` })];
}

function facts(model, gates) {
  const rows = [
    ["Variant", gates.variant],
    ["Parameters", number.format(gates.num_parameters)],
    ["Prompt rows", String(gates.prompt_len)],
    ["Reads pictures", model.reads_images ? "yes" : "no"],
  ];
  const list = element("dl", {});
  for (const [name, told] of rows) {
    list.append(element("dt", { textContent: name }), element("dd", { textContent: told }));
  }
  if (!gates.description) return list;
  return element("div", {}, element("p", { textContent: gates.description }), list);
}

function heatMap(gates) {
  if (!gates.gated_layers.length) {
    return [element("p", { className: "quiet", textContent: "It has no prompts, so there are no gates." })];
  }
  const readout = element("p", { className: "readout", role: "status" });
  const rest = "Gate of each layer and head";
  readout.textContent = rest;
  const table = gateTable(gates);
  const cursor = new Cursor(table, (cell) => {
    readout.textContent = cell
      ? `Layer ${cell.dataset.layer}, head ${cell.dataset.head}: ${cell.dataset.told}`
      : rest;
  });
  cursor.listen();
  return [readout, table, legend(gates)];
}

function gateTable(gates) {
  const highest = strongest(gates);
  const table = element("table", { className: "gates", tabIndex: 0 });
  table.append(element("caption", { className: "unseen", textContent: "Gate magnitude by layer and head" }));
  const heads = Array.from({ length: gates.heads }, (_, head) => head);
  const every = Math.ceil(gates.heads / 16); // numbers that fit beside one another
  const numbers = heads.map((head) =>
    element("th", { scope: "col", textContent: head, className: head % every ? "unseen-text" : "" }),
  );
  table.append(element("thead", {}, element("tr", {}, element("td"), ...numbers)));
  const body = element("tbody");
  for (let layer = gates.layers - 1; layer >= 0; layer--) { // the top layer on top
    const holds = gates.gated_layers.includes(layer);
    const row = element("tr", {}, element("th", { scope: "row", textContent: layer }));
    for (const head of heads) row.append(gateCell(layer, head, holds ? gates.gates[layer][head] : null, highest));
    body.append(row);
  }
  table.append(body);
  return table;
}

function gateCell(layer, head, gate, highest) {
  const told = gate === null ? "no prompt" : value(gate);
  const cell = element("td", { textContent: told, className: gate === null ? "empty" : "" });
  Object.assign(cell.dataset, { layer, head, told });
  if (gate !== null) cell.style.setProperty("--heat", highest ? gate / highest : 0);
  return cell;
}

function legend(gates) {
  const bar = element("span", { className: "bar", "aria-hidden": "true" });
  return element("p", { className: "legend" }, "0", bar, value(strongest(gates)));
}

const strongest = (gates) => Math.max(...gates.gates.flat());

// Which cell is told of: the one under the pointer, else the one that was pressed or moved to by the arrow keys.
class Cursor {
  #at; // where the arrow keys go on from
  #chosen = null; // `#at`, until the focus leaves

  constructor(table, tell) {
    this.table = table;
    this.tell = tell;
    this.#at = table.tBodies[0].rows[0].cells[1];
  }

  listen() {
    const cell = (event) => event.target.closest("tbody td");
    this.table.addEventListener("pointermove", (event) => this.#look(cell(event)));
    this.table.addEventListener("pointerdown", (event) => this.#choose(cell(event) ?? this.#at));
    this.table.addEventListener("pointerleave", () => this.#look(null));
    this.table.addEventListener("focus", () => this.#choose(this.#at));
    this.table.addEventListener("blur", () => {
      this.#chosen = null;
      this.#look(null);
    });
    this.table.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      this.#choose(this.#beside(...step));
    });
  }

  // The cell so far below and to the right, or the last one before the edge.
  #beside(down, right) {
    const rows = this.table.tBodies[0].rows;
    const row = rows[Math.min(Math.max(this.#at.parentElement.sectionRowIndex + down, 0), rows.length - 1)];
    return row.cells[Math.min(Math.max(this.#at.cellIndex + right, 1), row.cells.length - 1)];
  }

  #choose(cell) {
    this.#at = this.#chosen = cell;
    this.#look(cell);
  }

  #look(pointedAt) {
    const cell = pointedAt ?? this.#chosen;
    this.table.querySelector(".looked-at")?.classList.remove("looked-at");
    cell?.classList.add("looked-at");
    this.tell(cell);
  }
}
