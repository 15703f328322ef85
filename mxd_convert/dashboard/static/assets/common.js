"use strict";

// What both pages use. Data come as scripts that call MXD.give, since a page opened from disk may not fetch.
// Text from data goes into the page as text nodes only.
const MXD = (() => {
  const given = new Map();
  const asked = new Map();

  function give(name, content) {
    given.set(name, content);
  }

  function load(name) {
    if (!asked.has(name)) {
      asked.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = `${name}.js`;
        script.onload = () => (given.has(name) ? resolve(given.get(name)) : reject(new Error(`${name}.js holds no data`)));
        script.onerror = () => reject(new Error(`${name}.js is missing. Copy the whole folder of the dashboard, or write it again.`));
        document.head.append(script);
      }));
    }
    return asked.get(name);
  }

  function tell(error) {
    const place = document.getElementById("problem");
    place.hidden = false;
    place.textContent = error.message;
    console.error(error);
  }

  // make("td", {class: "n"}, "text", node, ...)
  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children);
    return node;
  }

  function draw(tag, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  function title(text) {
    return draw("title", {}, text);
  }

  const INVISIBLE = /([ \n\r\t\u0000-\u001f\u007f-\u00a0\u00ad\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff])/u;
  const SIGNS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"};

  // the text of a token into a node; what does not show is shown, subtly
  function spell(node, text) {
    for (const part of text.split(INVISIBLE)) {
      if (part === "") continue;
      if (INVISIBLE.test(part)) {
        const sign = SIGNS[part] ?? `U+${part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
        node.append(make("span", {class: "ws"}, sign), document.createElement("wbr"));
      } else {
        node.append(part);
      }
    }
    return node;
  }

  function token(text, attributes = {}) {
    return spell(make("span", {...attributes, class: `token ${attributes.class ?? ""}`.trim()}), text);
  }

  // to three figures, so that columns line up: 2.90, 31.0, 1,234
  function number(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace("e+", "e").replace("e-", "e−");
    return size >= 1000 ? whole(Math.round(value)) : value.toPrecision(3);
  }

  function whole(value) {
    return value.toLocaleString("en-GB");
  }

  function percent(share) {
    if (share === 0) return "0 %";
    const value = share * 100;
    return `${value >= 10 ? Number(value.toFixed(1)) : Number(value.toPrecision(2))} %`;
  }

  function signed(value, digits = 2) {
    return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
  }

  function labelsOf(summary, layer, expert) {
    return summary.labels.filter((label) => label.layer === layer && label.expert === expert);
  }

  // pairs of a term and its meaning
  function explain(list, entries) {
    list.replaceChildren(...entries.flatMap(([term, meaning]) => [make("dt", {}, term), make("dd", {}, meaning)]));
  }

  function source(summary) {
    const data = summary.data;
    const left = data.masked ? `, without ${data.masked}` : "";
    return `${whole(data.tokens)} tokens of ${data.path}${left}`;
  }

  function ready() {
    MXD.readyAt = performance.now();
    document.documentElement.dataset.ready = "yes";
  }

  return {give, load, tell, make, draw, title, token, number, whole, percent, signed, labelsOf, explain, source, ready};
})();
