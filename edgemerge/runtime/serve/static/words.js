// Figures in words.

export function number(value, digits) {
  return typeof value === "number" ? value.toFixed(digits) : "–";
}

/** A number of bytes, and its unit. */
export function size(bytes) {
  const units = ["bytes", "KiB", "MiB", "GiB"];
  let i = 0;
  while (i < 3 && bytes >= 1000) [bytes, i] = [bytes / 1024, i + 1];
  return [bytes.toFixed(i === 3 ? 2 : 0), units[i]];
}

export const inBytes = (bytes) => size(bytes).join(" ");

export function duration(seconds) {
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} days`;
}

export function percent(part, whole) {
  return whole ? `${((100 * part) / whole).toFixed(1)} %` : "–";
}

/** A difference of shares in percentage points, with its sign. */
export function points(share) {
  const text = Math.abs(100 * share).toFixed(1);
  return `${share < 0 && text !== "0.0" ? "−" : "+"}${text}`;
}

/** A time in UTC, as the server writes it, in the reader's own zone. */
export function moment(text) {
  const time = new Date(text);
  if (Number.isNaN(time.getTime())) return String(text);
  return time.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
