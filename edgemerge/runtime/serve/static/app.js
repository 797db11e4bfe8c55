// The conversation: what was said, how it is shown, and how an answer is asked for. Text from the
// model or the server enters the page as text nodes only, never as markup.

import { Refusal, hasKey, listModels, setKey, streamChat } from "./api.js";
import { $, make } from "./dom.js";
import { look, watch } from "./figures.js";
import { render } from "./markdown.js";
import { followTabs } from "./tabs.js";

const STORE = "edgemerge.conversation";
const WIDE = "(min-width: 60rem)"; // where style.css puts the panels beside the conversation
const DEFAULTS = { messages: [], model: "", system: "", temperature: 0.7, limit: 512 };

// A message is {role, content}; an answer also has model, note, and cut where it did not end by itself.
const state = { ...DEFAULTS, ...JSON.parse(sessionStorage.getItem(STORE) ?? "{}") };
let running = null; // AbortController of the answer being written

const save = () => sessionStorage.setItem(STORE, JSON.stringify(state));

// -- what is shown

function showMessage(message) {
  const article = make("article", { className: message.role });
  const text = make("div", { className: "text" });
  text.append(message.role === "user" ? message.content : render(message.content));
  const note = make("p", { className: "note" }, message.note ?? "");
  const who = message.role === "user" ? "You" : message.model;
  article.append(make("p", { className: "who" }, who), text, note);
  $("log").append(article);
  return { article, text, note };
}

function showConversation() {
  $("log").replaceChildren();
  state.messages.forEach(showMessage);
  scrollToEnd();
}

const isAtEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 48;
const scrollToEnd = () => $("log").scrollTo(0, $("log").scrollHeight);

/** Say one sentence above the message box; `again` puts a button beside it. */
function tell(sentence, again = null) {
  const follow = isAtEnd();
  const [text, button] = $("notice").children;
  $("notice").hidden = !sentence;
  text.textContent = sentence;
  button.hidden = !again;
  button.onclick = again;
  if (follow) scrollToEnd(); // the notice has taken room from the messages
}

function showModels(names) {
  const select = $("model");
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.disabled = !names.length;
  if (!names.includes(state.model)) state.model = names[0] ?? "";
  select.value = state.model;
}

// -- asking for an answer

/** What goes to the server: chat templates want the two roles to take turns. */
function turns() {
  const said = state.system.trim() ? [{ role: "system", content: state.system.trim() }] : [];
  for (const { role, content } of state.messages) {
    const last = said.at(-1);
    if (last?.role === role) last.content += `\n\n${content}`;
    else said.push({ role, content });
  }
  return said;
}

const isUnanswered = () => state.messages.length > 0
  && (state.messages.at(-1).role === "user" || Boolean(state.messages.at(-1).cut));

/** Ask once more for the answer that failed or was cut. */
function askAgain() {
  if (running || !isUnanswered()) return;
  if (state.messages.at(-1).role === "assistant") state.messages.pop();
  showConversation();
  answer();
}

async function answer() {
  tell("");
  setRunning(new AbortController());
  if (!state.model && !await learnModels(running.signal)) return setRunning(null);
  const request = {
    model: state.model, messages: turns(), temperature: state.temperature, max_tokens: state.limit,
  };
  const message = { role: "assistant", content: "", model: state.model, note: "", cut: true };
  const shown = showMessage(message);
  scrollToEnd();
  state.messages.push(message); // so that a reload keeps what has come so far
  const begin = performance.now();
  let first = 0;
  try {
    for await (const { text, finish } of streamChat(request, running.signal)) {
      if (text) {
        first ||= performance.now() - begin;
        const follow = isAtEnd();
        message.content += text;
        shown.text.replaceChildren(render(message.content));
        if (follow) scrollToEnd();
      }
      if (finish === "length") message.note = "Ended at the limit of its length. ";
    }
    message.cut = false;
    message.note += timing(first, performance.now() - begin);
  } catch (error) {
    if (state.messages.includes(message)) fail(error, message); // else a new conversation began
  } finally {
    setRunning(null);
  }
  const follow = isAtEnd();
  shown.note.textContent = message.note;
  if (!message.content && state.messages.includes(message)) drop(message, shown);
  save();
  if (follow) scrollToEnd();
  look();
}

/** Wait for the list of models, where a question came before it; tell whether it may be asked. */
async function learnModels(signal) {
  try {
    if (!await loadModels(signal)) return false;
  } catch (error) {
    if (!signal.aborted) {
      setRunning(null);
      throw error;
    }
  }
  if (signal.aborted && isUnanswered()) tell("Stopped before the first word.", askAgain);
  return !signal.aborted;
}

/** An answer without a word is none; the question stays. */
function drop(message, shown) {
  state.messages = state.messages.filter((other) => other !== message);
  shown.article.remove();
  if (!message.cut) tell("The model had nothing to say.", askAgain);
}

function fail(error, message) {
  if (error.name === "AbortError") {
    message.note = "Stopped.";
    if (message.content) message.cut = false; // as the reader wished
    else tell("Stopped before the first word.", askAgain);
    return;
  }
  if (!(error instanceof Refusal)) throw error;
  message.note = "Cut off.";
  if (error.status === 401) return askForKey();
  tell(error.message, askAgain);
  if (error.wait) setTimeout(() => inviteAgain(error.message), 1000 * error.wait);
}

/** After Retry-After has passed, unless the notice has changed meanwhile. */
function inviteAgain(sentence) {
  if ($("notice").hidden || $("notice").firstElementChild.textContent !== sentence) return;
  tell("You can try again now.", askAgain);
}

function timing(first, whole) {
  const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
  return first ? `First word after ${seconds(first)}, ${seconds(whole)} in all.` : "";
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  $("log").setAttribute("aria-busy", String(Boolean(controller))); // read out once it is whole
}

// -- the key

function askForKey() {
  tell("");
  $("unlock").querySelector("label").textContent = hasKey()
    ? "The server does not accept this key."
    : "This server asks for a key.";
  $("unlock").hidden = false;
  $("key").focus();
}

document.addEventListener("locked", askForKey);
$("unlock").addEventListener("submit", async (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  if (!await loadModels()) return;
  document.dispatchEvent(new Event("unlocked"));
  look();
  if ($("chat").hidden) return;
  $("text").focus();
  askAgain();
});

async function loadModels(signal = null) {
  try {
    showModels(await listModels(signal));
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 401) askForKey();
    else if (error.status) tell(error.message, isUnanswered() ? askAgain : null); // silence is told by the banner
    return false;
  }
  $("unlock").hidden = true;
  return true;
}

// -- what the reader does

function ask() {
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  grow();
  state.messages.push({ role: "user", content: text });
  showMessage(state.messages.at(-1));
  save();
  answer();
}

function grow() {
  const box = $("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`; // its borders
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  // an input method uses Enter to pick a word
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => {
  running?.abort();
  $("text").focus();
});
$("new").addEventListener("click", () => {
  running?.abort();
  state.messages = [];
  save();
  showConversation();
  tell("");
  $("text").focus();
});

$("model").addEventListener("change", () => {
  state.model = $("model").value;
  save();
});
$("system").addEventListener("input", () => {
  state.system = $("system").value;
  save();
});
$("heat").addEventListener("input", () => {
  state.temperature = $("heat").valueAsNumber;
  $("heat-shown").textContent = state.temperature.toFixed(1);
  save();
});
$("limit").addEventListener("change", () => {
  if (!$("limit").checkValidity() || !$("limit").value) $("limit").value = DEFAULTS.limit;
  state.limit = $("limit").valueAsNumber;
  save();
});

// -- start

$("system").value = state.system;
$("heat").value = state.temperature;
$("heat-shown").textContent = state.temperature.toFixed(1);
$("limit").value = state.limit;
$("figures").open = $("settings").open = matchMedia(WIDE).matches;
showConversation();
addEventListener("pagehide", save);
followTabs();
watch({
  async up() {
    const wasDown = !$("offline").hidden;
    $("offline").hidden = true;
    if (wasDown) document.dispatchEvent(new Event("answering"));
    if (!await loadModels()) return;
    if (!isUnanswered() || running) return;
    if (!wasDown && !$("notice").hidden) return; // why a first question failed says more
    tell(wasDown ? "The server answers again." : "The last answer is not whole.", askAgain);
  },
  down() {
    $("offline").hidden = false;
  },
});
