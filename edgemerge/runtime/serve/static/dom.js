// Nodes of the page. Text enters it as text nodes only, never as markup.

export const $ = (id) => document.getElementById(id);

/**
 * Make an element.
 * @param {string} tag Its name.
 * @param {object} properties Properties of it; those with a hyphen, `for` and `role` are attributes.
 * @param {...(Node|string)} children What is in it.
 */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "for" || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}
