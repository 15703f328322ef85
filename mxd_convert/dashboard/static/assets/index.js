"use strict";

(async () => {
  const {make, draw} = MXD;
  const PAGE = 100; // rows shown at a time
  const COLUMNS = [
    {key: "expert", name: "Expert", help: "index of the expert in the layer"},
    {key: "rate", name: "Fires on", help: "share of tokens with a positive coefficient"},
    {key: "mean", name: "Mean", help: "mean of the positive coefficients"},
    {key: "p99", name: "99 %", help: "99th percentile of the positive coefficients"},
    {key: "largest", name: "Largest", help: "largest coefficient"},
    {key: "top", name: "Top context", text: true},
    {key: "up", name: "Promotes", text: true},
  ];
  const $ = (id) => document.getElementById(id);
  const state = {layer: 0, show: "fires", sort: "expert", down: false, find: "", page: 0};
  let summary, tokens, rows, about, wanted, shown;

  const KINDS = {
    all: ["All", () => true],
    fires: ["Fire", (n) => rows.count[n] > 0],
    dead: ["Dead", (n) => rows.count[n] === 0],
    rare: ["Rare", (n) => rows.count[n] > 0 && rate(n) < summary.rates.rare],
    always_on: ["Always on", (n) => rate(n) > summary.rates.always],
    labelled: ["Labelled", (n) => rows.labels.has(n)],
  };

  function rate(n) {
    return rows.count[n] / about.tokens;
  }

  // --- where we are, in the address, so that Back and links lead here again ---

  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    const layer = Number(given.get("layer") ?? summary.layers[0].layer);
    state.layer = summary.layers.some((one) => one.layer === layer) ? layer : summary.layers[0].layer;
    state.show = given.get("show") in KINDS ? given.get("show") : "fires";
    const sort = given.get("sort") ?? "expert";
    state.down = sort.startsWith("-");
    const key = sort.replace("-", "");
    state.sort = COLUMNS.some((column) => column.key === key && !column.text) ? key : "expert";
    state.find = given.get("find") ?? "";
    state.page = Math.max(0, Number.parseInt(given.get("page") ?? "1", 10) - 1 || 0);
  }

  function note() {
    const said = new URLSearchParams({layer: state.layer});
    if (state.show !== "fires") said.set("show", state.show);
    if (state.sort !== "expert" || state.down) said.set("sort", `${state.down ? "-" : ""}${state.sort}`);
    if (state.find) said.set("find", state.find);
    if (state.page) said.set("page", state.page + 1);
    history.replaceState(null, "", `#${said}`);
  }

  // --- layers ---

  function showLayers() {
    const head = ["Layer", "Kind", "Experts", "Active per token", "Dead", "Rare", "Always on", "Firing rates"];
    const body = summary.layers.map((layer) => {
      const link = make("a", {href: `#layer=${layer.layer}`}, String(layer.layer));
      const cells = [layer.kind.replaceAll("_", " "), layer.n_experts, layer.active, layer.dead, layer.rare, layer.always_on];
      return make(
        "tr",
        {"aria-current": layer.layer === state.layer ? "true" : null},
        make("th", {scope: "row"}, link),
        ...cells.map((cell, i) => make("td", {class: i ? "n" : null}, i === 2 ? MXD.number(cell) : i ? MXD.whole(cell) : cell)),
        make("td", {}, spark(layer)),
      );
    });
    const headings = head.map((name, i) => make("th", {scope: "col", class: i > 1 && i < 7 ? "n" : null}, name));
    $("layers").replaceChildren(make("thead", {}, make("tr", {}, ...headings)), make("tbody", {}, ...body));
    if (summary.without.length) {
      const names = summary.without.map((layer) => `${layer.layer} (${layer.kind.replaceAll("_", " ")})`).join(", ");
      $("without").textContent = `Not shown, because they have no experts: layer ${names}.`;
      $("without").hidden = false;
    }
  }

  function spark(layer) {
    const bins = layer.density.experts;
    const most = Math.max(1, ...bins);
    const picture = draw("svg", {viewBox: `0 0 ${bins.length * 5} 22`, class: "spark", role: "img", "aria-label": "experts by firing rate"});
    bins.forEach((count, i) => {
      const height = count ? Math.max(1, (count / most) * 21) : 0;
      picture.append(draw("rect", {x: i * 5, y: 22 - height, width: 4, height}));
    });
    return picture;
  }

  // --- density ---

  function showDensity() {
    $("density-title").textContent = `Layer ${about.layer}: firing rates of the experts`;
    const fires = about.n_experts - about.dead;
    const cards = [
      [MXD.whole(about.n_experts), "experts"],
      [MXD.number(about.active), "active per token"],
      [MXD.whole(fires), "fire", "fires"],
      [MXD.whole(about.dead), "dead", "dead"],
      [MXD.whole(about.rare), "rare", "rare"],
      [MXD.whole(about.always_on), "always on", "always_on"],
    ];
    $("cards").replaceChildren(...cards.map(([figure, name, show]) => {
      const inside = [make("strong", {}, figure), make("span", {}, name)];
      if (!show) return make("div", {class: "card"}, ...inside);
      const button = make("button", {class: "card", type: "button", title: "show these experts below"}, ...inside);
      button.addEventListener("click", () => choose(show));
      return button;
    }));
    const {from, steps, experts} = about.density;
    const decades = experts.length / steps;
    const [width, height, left, bottom] = [960, 210, 44, 34];
    const dead = 78; // room for the bar of experts that never fired
    const most = Math.max(1, about.dead, ...experts);
    const step = (width - left - dead - 20) / experts.length;
    const at = (exponent) => left + dead + (exponent - from) * steps * step;
    const tall = (count) => (count ? Math.max(1.5, (count / most) * (height - bottom - 16)) : 0);
    const picture = draw("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "histogram of firing rates, logarithmic"});
    const {rare, always} = summary.rates;
    if (Math.log10(rare) > from) {
      picture.append(zone(at(from), at(Math.log10(rare)), "rare", height - bottom));
    }
    picture.append(zone(at(Math.log10(always)), at(0), "always", height - bottom));
    const bar = (x, w, count, kind, words) => {
      const tip = MXD.title(`${MXD.whole(count)} experts ${words}`);
      picture.append(draw("rect", {x, y: height - bottom - tall(count), width: w, height: tall(count), class: kind}, tip));
    };
    bar(left, 30, about.dead, "bar dead", "never fired");
    experts.forEach((count, i) => {
      const [low, high] = [10 ** (from + i / steps), 10 ** (from + (i + 1) / steps)];
      bar(left + dead + i * step, step - 2, count, "bar", `fire on ${MXD.percent(low)} to ${MXD.percent(high)} of the tokens`);
    });
    picture.append(draw("line", {x1: left - 6, x2: width - 20, y1: height - bottom, y2: height - bottom, class: "axis"}));
    picture.append(draw("text", {x: left + 15, y: height - bottom + 16, "text-anchor": "middle"}, "never"));
    for (let i = 0; i <= decades; i++) {
      const words = from + i >= 0 ? "every token" : MXD.percent(10 ** (from + i));
      picture.append(draw("text", {x: at(from + i), y: height - bottom + 16, "text-anchor": i === decades ? "end" : "middle"}, words));
    }
    for (const share of [0.5, 1]) {
      const count = Math.round(most * share);
      const y = height - bottom - (count / most) * (height - bottom - 16);
      picture.append(draw("line", {x1: left - 6, x2: width - 20, y1: y, y2: y, class: "grid"}));
      picture.append(draw("text", {x: left - 10, y: y + 4, "text-anchor": "end"}, MXD.whole(count)));
    }
    const words = `Experts by the share of tokens on which they fire, of ${MXD.whole(about.tokens)} tokens. Shaded: rare and always on.`;
    $("density").replaceChildren(make("div", {class: "scroll"}, picture), make("figcaption", {class: "muted"}, words));
  }

  function zone(from, to, name, height) {
    return draw(
      "g",
      {class: "zone"},
      draw("rect", {x: from, y: 6, width: Math.max(0, to - from), height: height - 6}),
      draw("text", {x: to - 6, y: 21, "text-anchor": "end"}, name),
    );
  }

  // --- the table of experts ---

  function choose(show) {
    state.show = show;
    state.page = 0;
    update();
    $("experts-title").scrollIntoView({block: "start"});
  }

  function showKinds() {
    const buttons = Object.entries(KINDS).map(([key, [name, test]]) => {
      const count = key === "all" ? about.n_experts : rows.count.reduce((sum, _, n) => sum + (test(n) ? 1 : 0), 0);
      if (key === "labelled" && count === 0) return null;
      const button = make("button", {type: "button", class: "chip", "aria-pressed": String(state.show === key), "data-show": key}, `${name} `);
      button.append(make("span", {class: "n"}, MXD.whole(count)));
      button.addEventListener("click", () => choose(key));
      return button;
    });
    $("show").replaceChildren(...buttons.filter(Boolean));
  }

  function showHead() {
    const cells = COLUMNS.map((column) => {
      if (column.text) return make("th", {scope: "col"}, column.name);
      const now = state.sort === column.key;
      const button = make("button", {type: "button", title: column.help}, column.name);
      button.append(make("span", {class: "arrow", "aria-hidden": "true"}, now ? (state.down ? "▾" : "▴") : "▴▾"));
      button.addEventListener("click", () => {
        state.down = now ? !state.down : column.key !== "expert";
        state.sort = column.key;
        state.page = 0;
        update();
        document.querySelector(`#experts th[data-key="${column.key}"] button`).focus();
      });
      const order = now ? (state.down ? "descending" : "ascending") : "none";
      return make("th", {scope: "col", "aria-sort": order, "data-key": column.key, class: "n"}, button);
    });
    document.querySelector("#experts thead").replaceChildren(make("tr", {}, ...cells));
  }

  // for each expert, all that is searched, in small letters; made at the first search
  function texts() {
    rows.texts ??= rows.count.map((_, n) => {
      const labels = (rows.labels.get(n) ?? []).map((label) => `${label.text} ${label.author ?? ""}`);
      const promoted = (rows.up[n] ?? []).map((number) => tokens.texts[number]);
      return [...labels, (rows.top[n] ?? []).join(""), ...promoted].join("\n").toLowerCase();
    });
    return rows.texts;
  }

  function matching() {
    const test = KINDS[state.show][1];
    const query = state.find.trim().toLowerCase();
    const digits = /^#?(\d+)$/.exec(query);
    const words = query.split(/\s+/).filter(Boolean);
    const among = [];
    for (let n = 0; n < rows.count.length; n++) if (test(n)) among.push(n);
    if (!query) return among;
    if (digits && query.startsWith("#")) return among.filter((n) => n === Number(digits[1]));
    const all = texts();
    return among.filter((n) => (digits && n === Number(digits[1])) || words.every((word) => all[n].includes(word)));
  }

  function sorted(list) {
    const column = state.sort === "expert" ? null : rows[state.sort === "rate" ? "count" : state.sort];
    const way = state.down ? -1 : 1;
    return list.sort(column ? (a, b) => way * (column[a] - column[b]) || a - b : (a, b) => way * (a - b));
  }

  function row(n) {
    const link = make("a", {href: `expert.html#${about.layer}:${n}`}, String(n));
    const first = make("th", {scope: "row", class: "n"}, link);
    if (rows.count[n] === 0) {
      return make("tr", {class: "dead"}, first, make("td", {class: "n"}, "never"), ...Array.from({length: 3}, () => make("td", {class: "n"}, "–")), make("td", {}), make("td", {}));
    }
    const labels = (rows.labels.get(n) ?? []).flatMap((label) => [make("span", {class: "label"}, label.text), " "]);
    const [before, at, after] = rows.top[n];
    const context = make(
      "td",
      {class: "context"},
      ...labels,
      make("div", {class: "kwic"}, make("div", {}, MXD.token(before)), make("div", {}, MXD.token(at, {class: "peak"}), MXD.token(after, {class: "after"}))),
    );
    const promoted = make("td", {class: "promoted"});
    for (const number of rows.up[n].slice(0, 5)) promoted.append(MXD.token(tokens.texts[number], {class: "chip"}), " ");
    return make(
      "tr",
      {},
      first,
      make("td", {class: "n", title: `${MXD.whole(rows.count[n])} tokens`}, MXD.percent(rate(n))),
      ...["mean", "p99", "largest"].map((key) => make("td", {class: "n"}, MXD.number(rows[key][n]))),
      context,
      promoted,
    );
  }

  function showRows() {
    const pages = Math.max(1, Math.ceil(wanted.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    const start = state.page * PAGE;
    shown = wanted.slice(start, start + PAGE);
    document.querySelector("#experts tbody").replaceChildren(...shown.map(row));
    $("range").textContent = wanted.length
      ? `${MXD.whole(start + 1)} to ${MXD.whole(start + shown.length)} of ${MXD.whole(wanted.length)}`
      : "No expert matches.";
    $("previous").disabled = state.page === 0;
    $("next").disabled = state.page >= pages - 1;
  }

  function update() {
    wanted = sorted(matching());
    showKinds();
    showHead();
    showRows();
    note();
  }

  function turn(by) {
    state.page += by;
    showRows();
    note();
  }

  function labelled() {
    const found = new Map();
    for (const label of summary.labels.filter((one) => one.layer === state.layer)) {
      found.set(label.expert, [...(found.get(label.expert) ?? []), label]);
    }
    return found;
  }

  async function showLayer() {
    about = summary.layers.find((layer) => layer.layer === state.layer);
    rows = await MXD.load(`data/${state.layer}/index`);
    rows.labels ??= labelled();
    $("find").value = state.find;
    showLayers();
    showDensity();
    update();
  }

  function showNotes() {
    const {rare, always} = summary.rates;
    const least = Math.ceil(1 / rare);
    const few = summary.data.tokens < least ? ` This text has fewer than ${MXD.whole(least)} tokens, too few to detect rare experts.` : "";
    MXD.explain($("notes"), [
      ["Text", `${MXD.source(summary)}; fingerprint ${summary.data.fingerprint.slice(0, 16)}. No expert was trained on held-out text.`],
      ["Coefficient", "Activation of an expert on a token. The expert's contribution to the output is proportional to it. The expert fires where it is positive."],
      ["Dead", "Never fired on this text. Some may fire on more text."],
      ["Rare", `Fired, but on fewer than one token in ${MXD.whole(Math.round(1 / rare))}.${few}`],
      ["Always on", `Fires on more than ${MXD.percent(always)} of the tokens.`],
      ["Top context", "The text around the token with the largest coefficient, which is marked."],
      ["Promotes", "The tokens whose logits the expert raises most, on average over the tokens on which it fires. Only the direct effect counts, without the layers above."],
      ["Search", "All words must occur in the labels, the promoted tokens or the top context. A number also finds the expert with this number; #17 finds only the expert."],
    ]);
  }

  try {
    [summary, tokens] = await Promise.all([MXD.load("data/summary"), MXD.load("data/tokens")]);
    const base = summary.base ? `, converted from ${summary.base}` : "";
    document.title = `Experts of ${summary.checkpoint}`;
    $("title").textContent = summary.checkpoint;
    $("about").textContent = `Activity of every expert on ${MXD.source(summary)}${base}. mxd-convert ${summary.version}.`;
    read();
    showNotes();
    $("find").addEventListener("input", () => {
      state.find = $("find").value;
      state.page = 0;
      update();
    });
    $("previous").addEventListener("click", () => turn(-1));
    $("next").addEventListener("click", () => turn(1));
    addEventListener("hashchange", () => {
      read();
      showLayer().catch(MXD.tell);
    });
    await showLayer();
    MXD.ready();
  } catch (error) {
    MXD.tell(error);
  }
})();
