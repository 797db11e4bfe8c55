// The Models tab: what is served, the models of the device's folder, the work that runs, the log.

import { Refusal, readJson, sendJson } from "./api.js";
import { showComparison } from "./comparison.js";
import { $, make } from "./dom.js";
import { MergeForm } from "./merging.js";
import { Work } from "./work.js";
import { inBytes, moment, percent } from "./words.js";

const AGAIN = ["unlocked", "answering"]; // when to ask once more
const box = $("workshop");
let isOpen = false;
let all = null; // what /admin/models told last
let form = null; // MergeForm, once it is known that one may merge

const parts = {
  notice: make("p", { className: "notice", role: "alert", hidden: true }),
  served: make("section", { className: "sheet" }),
  models: make("section", { className: "sheet" }),
  merging: make("section", { className: "sheet" }),
  log: make("section", { className: "sheet" }),
};
const work = new Work({ ended: refresh, failed: fail });
const chosen = new Set(); // keys of the questions to compare with
const seen = new Set(); // and of all that were to be chosen so far
box.replaceChildren(parts.notice, work.node, parts.served, parts.models, parts.merging, parts.log);

export function open() {
  if (isOpen) return;
  isOpen = true;
  for (const event of AGAIN) document.addEventListener(event, refresh);
  refresh();
}

export function close() {
  isOpen = false;
  for (const event of AGAIN) document.removeEventListener(event, refresh);
  work.rest();
}

async function refresh() {
  try {
    all = await readJson("/admin/models");
    work.follow(all.job, all.site?.names ?? {}); // first, for the rest may fail
    tell("");
    const mayChange = all.has_key && Boolean(all.site);
    showServed();
    showModels(mayChange);
    await showMerging(mayChange);
  } catch (error) {
    return fail(error);
  }
  return showLog();
}

function tell(sentence) {
  parts.notice.textContent = sentence;
  parts.notice.hidden = !sentence;
}

function fail(error) {
  if (!(error instanceof Refusal)) throw error;
  if (error.status === 401) document.dispatchEvent(new Event("locked"));
  else if (error.status) tell(error.message); // silence is told by the banner
}

/** Do something that changes the server, with its button shut meanwhile. */
async function change(button, path, document) {
  tell("");
  button.disabled = true;
  try {
    await sendJson(path, document);
    await refresh();
  } catch (error) {
    fail(error);
  } finally {
    button.disabled = false;
  }
}

// -- what is served

function showServed() {
  const cards = all.served.map((model) => card(
    model.name,
    [model.state === "loaded" ? "serves" : model.state],
    describe(model),
    [],
  ));
  parts.served.replaceChildren(make("h2", {}, "Served"), ...cards);
}

function describe(model) {
  if (model.problem) return [["File", `${model.file}: ${model.problem}`]];
  const known = recordOf(model.id);
  const made = known ?? model.made;
  const type = [model.architecture, model.file_type, millions(model.parameters), inBytes(model.bytes)];
  return [
    ["File", model.file],
    ["Type", type.filter(Boolean).join(", ")],
    ["Made", made ? madeOf(made) : "not by edgemerge"],
    ["Signed", signer(model, known)],
    known && ["Scores", scores(known)],
  ];
}

function signer(model, known) {
  if (model.signature) {
    const how = model.signature.is_checked ? "checked when it was loaded" : "not checked by this server";
    return `by the key ${model.signature.key.slice(0, 16)}…, ${how}`;
  }
  return known?.signed_by ? `what it was made of: by ${known.signed_by}` : "no";
}

const millions = (count) => (count >= 1e9
  ? `${(count / 1e9).toFixed(2)} billion parameters`
  : `${(count / 1e6).toFixed(count < 1e7 ? 1 : 0)} million parameters`);

const recordOf = (id) => all.site?.models.find((model) => model.id === id);

/** A method and what it was given, of a record or of a file's own provenance. */
function madeOf(made) {
  const inputs = (made.made_of ?? made.inputs).map((one) => one.name);
  if (!inputs.length) return made.method;
  return `${made.method} of ${inputs.join(", ")}`;
}

function scores(record) {
  const told = Object.entries(record.scores)
    .map(([task, { right, n }]) => `${task} ${percent(right, n)} of ${n}`);
  return told.join(" · ") || "none yet";
}

function card(title, marks, rows, buttons, ...more) {
  const list = make("dl", {});
  for (const [name, text] of rows.filter(Boolean)) {
    list.append(make("div", { className: "line" }, make("dt", {}, name), make("dd", {}, text)));
  }
  const head = make("h3", {}, title, ...marks.map((mark) => make("span", { className: "mark" }, mark)));
  const node = make("article", { className: "card" }, head, list, ...more);
  if (buttons.length) node.append(make("p", { className: "row" }, ...buttons));
  return node;
}

// -- the models of the folder

function showModels(mayChange) {
  if (!all.site) return parts.models.replaceChildren();
  const here = all.site.models.filter((model) => model.is_here);
  const questions = all.site.files.filter((file) => file.kind === "questions");
  choose(questions.map((file) => file.key));
  const cards = here.map((model) => modelCard(model, mayChange, questions));
  const hint = make("p", { className: "hint" }, "None yet: a merge below makes the first.");
  return parts.models.replaceChildren(
    make("h2", {}, "In this device's folder"),
    ...(here.length && mayChange ? [questionBoxes(questions)] : []),
    ...(here.length ? cards : [hint]),
  );
}

function modelCard(model, mayChange, questions) {
  const serves = model.id === all.site.current;
  const buttons = [];
  if (mayChange && serves && all.site.previous) {
    const name = all.site.names[all.site.previous] ?? all.site.previous;
    buttons.push(button(`Roll back to ${name}`, (node) => change(node, "/admin/rollback", {})));
  }
  if (mayChange && !serves) {
    const compare = button("Compare", (node) => change(node, "/admin/compare", {
      model: model.id, questions: [...chosen],
    }));
    compare.dataset.needs = "questions";
    compare.disabled = !chosen.size;
    if (questions.length) buttons.push(compare);
    buttons.push(button("Promote", (node) => change(node, "/admin/promote", { model: model.id })));
  }
  for (const one of buttons) one.setAttribute("aria-label", `${one.textContent}: ${model.name}`);
  return card(
    model.name,
    [serves ? "serves" : (model.decision ?? "not tried").replace("_", " ")],
    [
      ["Made", `${moment(model.made)}, ${madeOf(model)}`],
      ["Type", [model.settings.type, inBytes(model.bytes)].filter(Boolean).join(", ")],
      ["Signed", model.signed_by ? `what it was made of: by ${model.signed_by}` : "no"],
      ["Scores", scores(model)],
      model.reason && ["Why", model.reason],
    ],
    buttons,
    ...(model.compared ? [showComparison(model.compared, all.site.names)] : []),
  );
}

const button = (text, act) => {
  const node = make("button", { type: "button" }, text);
  node.addEventListener("click", () => act(node));
  return node;
};

/** Keep which questions a comparison asks: at first all, and each that is new. */
function choose(keys) {
  for (const key of [...chosen]) if (!keys.includes(key)) chosen.delete(key);
  for (const key of keys) if (!seen.has(key)) chosen.add(key);
  keys.forEach((key) => seen.add(key));
}

function questionBoxes(questions) {
  if (!questions.length) {
    return make("p", { className: "hint" }, "To compare models, put a FILE.jsonl of questions into a folder of --merge-from.");
  }
  const boxes = questions.map((file) => {
    const input = make("input", { type: "checkbox", checked: chosen.has(file.key) });
    input.addEventListener("change", () => {
      if (input.checked) chosen.add(file.key);
      else chosen.delete(file.key);
      for (const node of box.querySelectorAll("[data-needs=questions]")) node.disabled = !chosen.size;
    });
    return make("label", { className: "check" }, input, make("span", {}, file.name));
  });
  return make("fieldset", { className: "row" }, make("legend", {}, "Questions to compare with"), ...boxes);
}

// -- merging, and the log

async function showMerging(mayChange) {
  if (!mayChange) {
    const why = all.has_key
      ? "To merge here, start the server with --site DIR, the folder of this device."
      : "Nothing can be changed here, for this server has no key. Start it with one: "
        + "EDGEMERGE_API_KEY=$(openssl rand -hex 24), or --api-key-file.";
    return parts.merging.replaceChildren(make("h2", {}, "Merge"), make("p", { className: "hint" }, why));
  }
  if (!form) {
    form = new MergeForm(await readJson("/admin/methods"), { begun: refresh, failed: fail, tell });
    parts.merging.replaceChildren(make("h2", {}, "Merge"), form.node);
  }
  return form.setFiles(all.site.files.filter((file) => file.kind !== "questions"));
}

const EVENTS = {
  merged: "was merged", compared: "was compared", promoted: "was promoted",
  rolled_back: "was taken back", refused: "was refused", repaired: "The log was repaired",
  restored: "was made again, for its file was lost",
};

function showLog() {
  if (!all.site?.log.length) return parts.log.replaceChildren();
  const isShown = parts.log.querySelector("details")?.open ?? false;
  const lines = all.site.log.toReversed().map((event) => {
    const what = EVENTS[event.event] ?? String(event.event);
    const who = all.site.names[event.id] ?? event.name ?? event.id;
    const text = [who, what].filter(Boolean).join(" ") + (event.reason ? `: ${event.reason}` : "");
    return make("li", {}, make("time", { dateTime: event.time }, moment(event.time)), ` ${text}`);
  });
  return parts.log.replaceChildren(make(
    "details", { open: isShown }, make("summary", {}, "What was done"), make("ol", { className: "log" }, ...lines),
  ));
}
