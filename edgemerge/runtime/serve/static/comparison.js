// Two models on the same questions: how many each has right, and how sure the difference is.

import { make } from "./dom.js";
import { percent, points } from "./words.js";

/**
 * @param {{with: ?string, tasks: object[]}} compared A comparison of the log.
 * @param {Object<string, string>} names Models' names by id.
 */
export function showComparison(compared, names) {
  const other = names[compared.with] ?? compared.with ?? "the model that served first";
  const rows = compared.tasks.map((task) => make(
    "li",
    {},
    make("b", {}, `${task.task}: ${verdict(task)}`),
    make("span", {}, `${percent(task.right[1], task.n)} instead of ${percent(task.right[0], task.n)}`
      + ` of ${task.n} questions`),
    make("span", { className: "hint" }, `${points(task.difference)} points, 95 % interval `
      + `${points(task.low)} to ${points(task.high)}; right alone ${task.only[1]} : ${task.only[0]}, `
      + `McNemar p ${task.p < 0.0005 ? "< 0.001" : task.p.toFixed(3)}`),
  ));
  return make(
    "div", { className: "compared" }, make("p", { className: "hint" }, `Compared with ${other}`),
    make("ul", {}, ...rows),
  );
}

/** A difference is sure where both the interval and the test, which is exact, say so. */
function verdict(task) {
  if (task.p >= 0.05 || (task.low <= 0 && task.high >= 0)) return "no sure difference";
  return task.low > 0 ? "better" : "worse";
}
