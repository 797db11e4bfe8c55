// The server as the page sees it: OpenAI's API and /health. Every failure becomes a `Refusal` whose
// message is one plain sentence.

const KEY = "edgemerge.key";

export class Refusal extends Error {
  /**
   * @param {string} sentence What to tell the reader.
   * @param {number} status HTTP status; 0 where no answer came.
   * @param {number} wait Seconds after which another try makes sense; 0 if waiting does not help.
   */
  constructor(sentence, status = 0, wait = 0) {
    super(sentence);
    this.status = status;
    this.wait = wait;
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const setKey = (key) => sessionStorage.setItem(KEY, key);

/** Names of the server's models; the signal, if any, ends the wait. */
export async function listModels(signal) {
  return (await readJson("/v1/models", signal)).data.map((model) => String(model.id));
}

/** What a GET route says. */
export async function readJson(path, signal = null) {
  return readBody(await ask(path, { signal }), signal);
}

/** What a POST route says to a document. */
export async function sendJson(path, document) {
  const headers = { "Content-Type": "application/json" };
  return readBody(await ask(path, { method: "POST", headers, body: JSON.stringify(document) }));
}

/** What /health says, also while the server is stopping and answers 503. */
export async function readHealth() {
  const response = await send("/health", { signal: AbortSignal.timeout(8000) });
  if (!response.ok && response.status !== 503) throw await explain(response);
  return readBody(response);
}

/**
 * Ask for an answer and yield it piece by piece: {text} or {finish}, the reason why it ended.
 * @param {object} request Body of POST /v1/chat/completions, without `stream`.
 * @param {AbortSignal} signal Ends the answer; the server stops computing.
 */
export async function* streamChat(request, signal) {
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true }),
    signal,
  });
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(sentence(event.error.message), response.status);
      const [choice] = event.choices ?? [];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) yield { finish: choice.finish_reason };
    }
  } catch (error) {
    if (signal.aborted || error instanceof Refusal) throw error;
  }
  throw new Refusal("The server went away in the middle of the answer.");
}

/** Data of each server-sent event; a chunk from the network may end anywhere in one. */
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already, which was told above
  }
}

async function ask(path, options = {}) {
  const response = await send(path, options);
  if (!response.ok) throw await explain(response);
  return response;
}

async function send(path, options) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  try {
    if (key !== null) headers.set("Authorization", `Bearer ${key}`);
  } catch {
    // No header carries such a key. Without it the server asks for one.
  }
  const response = await hear(fetch(path, { ...options, headers, cache: "no-store" }), options.signal);
  const isLate = response.status === 401 && key !== sessionStorage.getItem(KEY); // a key came meanwhile
  return isLate ? send(path, options) : response;
}

/** The document of an answer. */
const readBody = (response, signal) => hear(response.json(), signal);

/** What comes of the server, which may go away at any byte. */
const hear = (coming, signal) => coming.catch((error) => {
  throw signal?.aborted && error.name === "AbortError" ? error : new Refusal("The server does not answer.");
});

async function explain(response) {
  const { status } = response;
  const wait = Number(response.headers.get("Retry-After")) || 0;
  const error = await response.json().then((body) => body.error ?? {}, () => ({}));
  if (status === 429) {
    return new Refusal(`The server is busy; try again in ${wait || 5} s.`, status, wait || 5);
  }
  if (error.code === "context_length_exceeded") {
    return new Refusal(
      "The conversation is longer than the model can read; start a new one.", status);
  }
  return new Refusal(
    sentence(error.message) || `The server refused the request (HTTP ${status}).`, status, wait);
}

/** A message from the server as one sentence of bearable length. */
function sentence(message) {
  if (typeof message !== "string" || !message.trim()) return "";
  const text = message.trim().replace(/\s+/g, " ");
  const short = text.length > 240 ? `${text.slice(0, 239)}…` : text;
  const start = short[0].toUpperCase() + short.slice(1);
  return /[.!?…]$/.test(start) ? start : `${start}.`;
}
