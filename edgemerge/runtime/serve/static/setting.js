// A parameter of a method as something to set: a slider with its number, a number, a switch, or words.

import { make } from "./dom.js";

const STEPS = 100; // of a slider
let last = 0; // for ids

export class Setting {
  /**
   * @param {object} parameter As /admin/methods tells it.
   * @param {string} model Whose it is, where each model has its own.
   */
  constructor(parameter, model = "") {
    this.parameter = parameter;
    this.name = model ? `${parameter.name} of ${model}` : parameter.name;
    this.id = `setting-${last += 1}`;
    const label = make("label", { for: this.id }, parameter.name);
    this.input = this.makeInput();
    this.input.id = this.id;
    if (model) this.input.setAttribute("aria-label", this.name);
    if (parameter.help) this.input.title = parameter.help;
    this.node = make("div", { className: "setting" }, label, ...this.withSlider(), this.input);
  }

  makeInput() {
    const { default: value, kind, words } = this.parameter;
    if (kind === "word" || (kind === "switch" && words.length)) {
      const all = kind === "word" ? words : ["false", "true", ...words];
      const options = all.map((word) => new Option(word, word, false, word === String(value)));
      return make("select", {}, ...options);
    }
    if (kind === "switch") return make("input", { type: "checkbox", checked: value === true });
    const input = make("input", { type: "number", step: kind === "count" ? 1 : "any", required: true });
    if (kind === "fraction") [input.min, input.max] = [0, 1];
    if (kind === "count") input.min = 0;
    input.value = value ?? "";
    return input;
  }

  /** The slider, where the parameter has a usual span; the number beside it may lie outside. */
  withSlider() {
    const { span, kind } = this.parameter;
    if (!span) return [];
    const [min, max] = span;
    const step = kind === "count" ? 1 : (max - min) / STEPS;
    const slider = make("input", { type: "range", min, max, step, "aria-label": `${this.name}, slider` });
    slider.value = this.input.value;
    slider.addEventListener("input", () => {
      this.input.value = String(Number(slider.valueAsNumber.toPrecision(4)));
    });
    this.input.addEventListener("input", () => { slider.value = this.input.value; });
    return [slider];
  }

  get isValid() {
    return this.input.checkValidity();
  }

  /** What was set, in the type that the server takes. */
  get value() {
    const { kind } = this.parameter;
    if (this.input.type === "checkbox") return this.input.checked;
    if (this.input.type === "number") return this.input.valueAsNumber;
    if (kind === "switch" && ["true", "false"].includes(this.input.value)) return this.input.value === "true";
    return this.input.value;
  }

  /** Whether it must be sent: what is as by default need not be. */
  get isSet() {
    const { default: value, name } = this.parameter;
    return name === "weight" || name === "t" || this.value !== value;
  }
}

/** The values of settings by name. */
export function valuesOf(settings) {
  const set = settings.filter((setting) => setting.isSet);
  return Object.fromEntries(set.map((setting) => [setting.parameter.name, setting.value]));
}
