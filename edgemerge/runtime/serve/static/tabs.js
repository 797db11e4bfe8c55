// The two pages: the conversation, and the models. The second is loaded when somebody looks at it.

import { $ } from "./dom.js";

const MODELS = "#/models";
let page = null; // the module, once it is loaded

/** Show what the address names, now and whenever it changes. */
export function followTabs() {
  addEventListener("hashchange", show);
  show();
}

async function show() {
  const isModels = location.hash === MODELS;
  $("chat").hidden = isModels;
  $("workshop").hidden = !isModels;
  $("new").hidden = $("settings").hidden = isModels;
  document.querySelector("header .model").hidden = isModels;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === (isModels ? MODELS : "#/")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  // one form asks for the key, wherever the reader is
  if (isModels) $("workshop").before($("unlock"));
  else $("composer").before($("unlock"));
  if (!isModels && !page) return;
  try {
    page ??= await import("./models.js");
  } catch { // the server went away meanwhile, or this page does
    $("workshop").textContent = "The server does not answer; go to Chat and come back to try again.";
    return;
  }
  if (location.hash === MODELS) page.open();
  else page.close();
}
