// A merge as a form: method, base, models with their sliders, the type; its plan; its beginning.

import { Refusal, sendJson } from "./api.js";
import { make } from "./dom.js";
import { Setting, valuesOf } from "./setting.js";
import { duration, inBytes } from "./words.js";

const FIRST = "ties"; // the method to begin with
const FEW = 2; // settings of a model that are shown at once

export class MergeForm {
  /**
   * @param {{methods: object[], types: string[]}} choices What /admin/methods told.
   * @param {{begun: function(): void, failed: function(Error): void, tell: function(string): void}}
   *   callbacks Called when a merge has begun, and when something cannot be done.
   */
  constructor(choices, callbacks) {
    this.choices = choices;
    this.callbacks = callbacks;
    this.files = [];
    this.edits = 0; // how often what a plan is of was changed
    this.rows = new Map(); // key -> {input, settings, node} of the models
    this.shared = []; // settings of the merge
    this.method = labelled("Method", make("select", {}, ...choices.methods.map(
      ({ name }) => new Option(name, name, false, name === FIRST))));
    this.summary = make("p", { className: "hint" });
    this.base = labelled("Base", make("select", {}));
    this.models = make("fieldset", { className: "models" });
    this.numbers = make("fieldset", { className: "numbers" });
    this.type = labelled("Type of the output", make("select", {}, ...choices.types.map(
      (name) => new Option(name === "keep" ? "as the inputs" : name, name))));
    this.name = labelled("Name of the result", make("input", {
      type: "text", required: true, maxLength: 48, pattern: "[A-Za-z0-9][A-Za-z0-9 ._\\-]*",
      title: "letters, digits, spaces, and . _ -", autocomplete: "off",
    }));
    this.ask = make("button", { type: "button" }, "Show the plan");
    this.start = make("button", { type: "submit", className: "primary", disabled: true }, "Merge");
    this.plan = make("div", { className: "plan", role: "status", "aria-live": "polite" });
    this.node = make(
      "form", { className: "merging", noValidate: true }, this.method.node, this.summary, this.base.node,
      this.models, this.numbers, this.type.node, this.name.node,
      make("p", { className: "row" }, this.ask, this.start), this.plan,
    );
    this.listen();
    this.showMethod();
  }

  listen() {
    this.method.input.addEventListener("change", () => this.showMethod());
    this.base.input.addEventListener("change", () => this.showModels());
    this.node.addEventListener("input", (event) => {
      if (event.target !== this.name.input) this.forgetPlan();
    });
    this.ask.addEventListener("click", () => this.showPlan());
    this.node.addEventListener("submit", (event) => {
      event.preventDefault();
      this.merge();
    });
  }

  get chosen() {
    return this.choices.methods.find(({ name }) => name === this.method.input.value);
  }

  /** Show other files, and keep what was chosen of those that are still there. */
  setFiles(files) {
    if (JSON.stringify(files) === JSON.stringify(this.files)) return;
    this.files = files;
    this.showBases();
    this.showModels();
    this.forgetPlan();
  }

  // -- what there is to choose

  showMethod() {
    const { summary, parameters } = this.chosen;
    this.summary.textContent = summary;
    this.rows.clear();
    this.shared = parameters.filter((one) => !one.of_model).map((one) => new Setting(one));
    const isMain = ({ parameter }) => !parameter.needs && (parameter.span || parameter.default === null);
    const main = this.shared.filter(isMain);
    const rest = this.shared.filter((setting) => !isMain(setting));
    this.seed = new Setting({
      name: "seed", help: "of methods that draw by chance", default: 0, kind: "count", words: [],
    });
    this.numbers.replaceChildren(
      make("legend", {}, "Numbers of the merge"), ...main.map(({ node }) => node),
      make("details", {}, make("summary", {}, "More"), ...[...rest, this.seed].map(({ node }) => node)),
    );
    this.showBases();
    this.showModels();
    this.forgetPlan();
  }

  showBases() {
    const { base } = this.chosen;
    const before = this.base.input.value;
    const models = this.files.filter((file) => file.kind === "model");
    const options = models.map((file) => new Option(nameOf(file), file.key));
    if (base !== "needed") options.unshift(new Option("none", ""));
    this.base.input.replaceChildren(...options);
    if (options.some((option) => option.value === before)) this.base.input.value = before;
    this.base.node.hidden = base === "none";
  }

  showModels() {
    const own = this.chosen.parameters.filter((one) => one.of_model);
    const others = this.files.filter((file) => this.base.node.hidden || file.key !== this.base.input.value);
    const kept = new Map();
    for (const file of others) kept.set(file.key, this.rows.get(file.key) ?? row(file, own));
    this.rows = kept;
    this.models.replaceChildren(
      make("legend", {}, "Models and deltas"), ...[...kept.values()].map(({ node }) => node),
    );
    if (!others.length) {
      this.models.append(make("p", { className: "hint" }, "Put GGUF files into a folder of --merge-from."));
    }
  }

  // -- the plan, and the merge

  forgetPlan() {
    this.edits += 1;
    this.start.disabled = true;
    this.plan.replaceChildren();
  }

  /** What the server is asked for; null, and a sentence, where the form is not filled in. */
  request() {
    const { least, most } = this.chosen;
    const taken = [...this.rows.entries()].filter(([, { input }]) => input.checked);
    if (taken.length < least || (most && taken.length > most)) {
      const count = most === least ? `${least}` : most ? `${least} to ${most}` : `at least ${least}`;
      this.callbacks.tell(`Choose ${count} of the models and deltas for ${this.chosen.name}.`);
      return null;
    }
    const settings = [...taken.flatMap(([, one]) => one.settings), ...this.shared, this.seed];
    const wrong = settings.find((setting) => !setting.isValid);
    if (wrong) {
      this.callbacks.tell(`The number of ${wrong.parameter.name} is not one that it may have.`);
      wrong.input.focus();
      return null;
    }
    return {
      method: this.chosen.name,
      base: this.base.node.hidden ? null : this.base.input.value || null,
      models: taken.map(([file, one]) => ({ file, parameters: valuesOf(one.settings) })),
      parameters: valuesOf(this.shared),
      type: this.type.input.value,
      seed: this.seed.value,
    };
  }

  async showPlan() {
    this.callbacks.tell("");
    const request = this.request();
    if (!request) return;
    this.ask.disabled = true;
    this.plan.replaceChildren("Planning…");
    const { edits } = this;
    try {
      const plan = await sendJson("/admin/plan", request);
      if (edits !== this.edits) return; // it is of another merge
      this.plan.replaceChildren(...planLines(plan));
      this.start.disabled = false;
    } catch (error) {
      const isOfThis = edits === this.edits;
      this.forgetPlan();
      if (!(error instanceof Refusal) || !error.status || error.status === 401) this.callbacks.failed(error);
      else if (isOfThis) this.plan.append(error.message);
    } finally {
      this.ask.disabled = false;
    }
  }

  async merge() {
    if (this.start.disabled) return; // Enter in a field, before there is a plan
    const request = this.request();
    const name = this.name.input;
    if (!request) return;
    if (!name.checkValidity()) {
      this.callbacks.tell("Give the result a name of letters, digits, spaces, and . _ -");
      name.focus();
      return;
    }
    this.start.disabled = true;
    const { edits } = this;
    try {
      await sendJson("/admin/merge", { ...request, name: name.value.trim() });
      this.forgetPlan();
      this.callbacks.begun();
    } catch (error) {
      this.start.disabled = edits !== this.edits;
      this.callbacks.failed(error);
    }
  }
}

function labelled(text, input) {
  input.id = `merge-${text.split(" ")[0].toLowerCase()}`;
  const node = make("p", { className: "field" }, make("label", { for: input.id }, text), input);
  return { node, input };
}

const nameOf = (file) => `${file.name} (${inBytes(file.bytes)})`;

/** A file with its own settings, which show once it is taken. */
function row(file, parameters) {
  const input = make("input", { type: "checkbox" });
  const settings = parameters.map((one) => new Setting(one, file.name));
  const [few, more] = [settings.slice(0, FEW), settings.slice(FEW)];
  const kind = file.kind === "delta" ? `delta of ${file.base || "a base"}, ` : "";
  const own = make("div", { className: "own", hidden: true }, ...few.map(({ node }) => node));
  if (more.length) {
    own.append(make("details", {}, make("summary", {}, "More"), ...more.map(({ node }) => node)));
  }
  input.addEventListener("change", () => { own.hidden = !input.checked; });
  const label = make(
    "label", { className: "check" }, input, make("span", {}, `${file.name} `),
    make("span", { className: "hint" }, `${kind}${inBytes(file.bytes)}`),
  );
  return { input, settings, node: make("div", { className: "model" }, label, own) };
}

function planLines(plan) {
  const basis = { method: "as merges by this method took here", merges: "as merges took here" };
  const time = plan.basis === "disk"
    ? `at least ${spell(plan.seconds)}, for the disk alone; no merge was made here yet`
    : `about ${spell(plan.seconds)}, ${basis[plan.basis]}`;
  const rows = [
    ["Memory", `${inBytes(plan.needed_bytes)} of ${inBytes(plan.budget_bytes)} beside the server`],
    ["Time", time],
    ["Reads", `${inBytes(plan.read_bytes)}, in ${plan.passes} ${plan.passes === 1 ? "pass" : "passes"}`],
    ["Writes", `${inBytes(plan.written_bytes)} (${plan.file_type}), ${inBytes(plan.free_bytes)} are free`],
  ];
  const list = make("dl", {}, ...rows.map(([name, text]) => make(
    "div", { className: "line" }, make("dt", {}, name), make("dd", {}, text))));
  return [list, ...plan.notes.map((note) => make("p", { className: "hint" }, note))];
}

const spell = (seconds) => (seconds < 1 ? "1 s" : duration(seconds));
