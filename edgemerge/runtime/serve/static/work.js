// The work that runs beside the server: its progress, a button that ends it, and how it ended.

import { readJson, sendJson } from "./api.js";
import { make } from "./dom.js";
import { duration, inBytes } from "./words.js";

const PERIOD = 1000; // ms between two looks
const STEP = 25; // percent, after which a screen reader is told again

export class Work {
  /**
   * @param {{ended: function(): Promise, failed: function(Error): void}} callbacks Called when the work
   *   has ended, and when the server refuses something.
   */
  constructor(callbacks) {
    this.callbacks = callbacks;
    this.names = {};
    this.job = null;
    this.timer = 0;
    this.heard = "";
    this.title = make("h2", {});
    this.bar = make("progress", { "aria-label": "Progress" });
    this.line = make("p", { className: "hint" });
    this.voice = make("p", { className: "unseen", role: "status", "aria-live": "polite" });
    this.stop = make("button", { type: "button" }, "Cancel");
    this.stop.addEventListener("click", () => this.cancel());
    this.shown = make(
      "div", { className: "sheet work", hidden: true }, this.title, this.bar, this.line,
      make("p", { className: "row" }, this.stop),
    );
    this.node = make("div", {}, this.shown, this.voice);
  }

  /** Show a job, and look at it until it ends. */
  follow(job, names) {
    clearTimeout(this.timer);
    this.names = names;
    this.job = job;
    this.show();
    if (job?.state === "running") this.timer = setTimeout(() => this.look(), PERIOD);
  }

  rest() {
    clearTimeout(this.timer);
  }

  async look() {
    try {
      const { job } = await readJson("/admin/job");
      this.follow(job, this.names); // first, for what is called at its end may fail
      return job?.state === "running" ? null : this.callbacks.ended();
    } catch (error) {
      this.timer = setTimeout(() => this.look(), PERIOD);
      return this.callbacks.failed(error);
    }
  }

  async cancel() {
    this.stop.disabled = true;
    let failure = null;
    try {
      await sendJson("/admin/cancel", { job: this.job.id });
    } catch (error) {
      failure = error;
    }
    this.stop.disabled = false;
    await this.callbacks.ended(); // it clears what was told before
    if (failure) this.callbacks.failed(failure);
  }

  show() {
    const { job } = this;
    this.shown.hidden = !job;
    if (!job) return;
    const isRunning = job.state === "running";
    const verb = job.kind === "merge" ? "Merge" : "Comparison of";
    this.title.textContent = `${verb} ${job.title}`;
    this.bar.hidden = this.stop.hidden = !isRunning;
    if (job.total) [this.bar.max, this.bar.value] = [job.total, job.done];
    else this.bar.removeAttribute("value");
    this.line.textContent = isRunning ? this.progress(job) : end(job);
    this.say(isRunning ? job : null);
  }

  progress(job) {
    const name = job.stage.replace(/[0-9a-f]{16}/, (id) => this.names[id] ?? id);
    const count = job.unit
      ? `${job.done} of ${job.total} ${job.unit}`
      : `${inBytes(job.done)} of ${inBytes(job.total)}`;
    return [name, job.total && count, duration(job.seconds)].filter(Boolean).join(" · ");
  }

  /** Tell a screen reader the stage, and each quarter of it; not every second. */
  say(job) {
    const part = job?.total ? STEP * Math.floor((100 * job.done) / job.total / STEP) : 0;
    const text = job ? `${job.stage}${part ? `, ${part} %` : ""}` : this.line.textContent;
    if (text === this.heard) return;
    this.heard = this.voice.textContent = text;
  }
}

function end(job) {
  const took = `after ${duration(job.seconds)}`;
  if (job.state === "failed") return `Failed ${took}: ${job.sentence}`;
  if (job.state === "cancelled") return `Cancelled ${took}; nothing of it is left.`;
  if (job.kind === "compare") return [`Done ${took}.`, job.result.note].filter(Boolean).join(" ");
  const known = job.result.is_known ? " The folder had the very same model already." : "";
  return `Done ${took}: ${inBytes(job.result.out_bytes)}, memory ${inBytes(job.result.peak_rss_bytes)} `
    + `at most.${known} ${job.result.notes.join(". ")}`.trimEnd();
}
