// Markdown of an answer as nodes of the page. What the model writes becomes text nodes only, so that no
// markup of its own has an effect; links stay text, as nobody knows where they lead.

const FENCE = /^\s*(```|~~~)/;
const HEADING = /^#{1,6}\s+(.+)/;
const RULE = /^\s*([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)/;
const INLINE = /(`+)(.+?)\1|\*\*(\S.*?)\*\*|(?<![\w*])\*(\S[^*]*?)\*(?!\w)/;
const DEEPEST = 20; // lists in one another: each takes of the stack
const LONGEST = 2000; // characters of a line whose inline marks are looked for: the search is quadratic

/** Nodes for a text. */
export function render(text) {
  return blocks(text.split("\n"), 0);
}

function blocks(lines, level) {
  const nodes = document.createDocumentFragment();
  while (lines.length) {
    if (!lines[0].trim()) lines.shift();
    else if (FENCE.test(lines[0])) nodes.append(code(lines));
    else if (HEADING.test(lines[0])) nodes.append(block("h3", HEADING.exec(lines.shift())[1]));
    else if (RULE.test(lines[0])) nodes.append(rule(lines));
    else if (level < DEEPEST && ITEM.test(lines[0])) nodes.append(list(lines, level));
    else nodes.append(paragraph(lines));
  }
  return nodes;
}

/** Lines up to the closing fence, or all that has come so far. */
function code(lines) {
  const [, fence] = FENCE.exec(lines.shift());
  const said = [];
  while (lines.length && !lines[0].trim().startsWith(fence)) said.push(lines.shift());
  lines.shift();
  const pre = document.createElement("pre");
  pre.append(leaf("code", said.join("\n")));
  return pre;
}

function rule(lines) {
  lines.shift();
  return document.createElement("hr");
}

/** Items of one kind; what is further in than its mark belongs to an item. */
function list(lines, level) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const isNumbered = /\d/.test(mark);
  const node = document.createElement(isNumbered ? "ol" : "ul");
  if (isNumbered) node.start = parseInt(mark, 10);
  for (;;) {
    const found = ITEM.exec(lines[0] ?? "");
    if (!found || found[1].length > indent.length || /\d/.test(found[2]) !== isNumbered) break;
    if (RULE.test(lines[0])) break;
    lines.shift();
    const inner = [found[3]];
    while (lines.length && depth(lines[0]) > indent.length) inner.push(lines.shift());
    const item = document.createElement("li");
    item.append(blocks(inner, level + 1));
    node.append(item);
    if (!lines[0]?.trim() && ITEM.test(lines[1] ?? "")) lines.shift(); // a loose list
  }
  return node;
}

function depth(line) {
  return line.length - line.trimStart().length;
}

function paragraph(lines) {
  const said = [];
  do said.push(lines.shift());
  while (lines[0]?.trim() && ![FENCE, HEADING, RULE, ITEM].some((mark) => mark.test(lines[0])));
  return block("p", said.join("\n"));
}

function block(tag, text) {
  const node = document.createElement(tag);
  node.append(...inline(text));
  return node;
}

function inline(text) {
  const nodes = [];
  let rest = text;
  for (let found; rest.length <= LONGEST && (found = INLINE.exec(rest));) {
    const [whole, , quoted, strong, stressed] = found;
    if (found.index) nodes.push(rest.slice(0, found.index));
    if (quoted !== undefined) nodes.push(leaf("code", quoted));
    else nodes.push(block(strong === undefined ? "em" : "strong", strong ?? stressed));
    rest = rest.slice(found.index + whole.length);
  }
  if (rest) nodes.push(rest);
  return nodes;
}

function leaf(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}
