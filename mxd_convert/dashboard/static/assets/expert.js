"use strict";

(async () => {
  const {make, draw} = MXD;
  const $ = (id) => document.getElementById(id);
  let summary, tokens;

  async function show() {
    const [layer, n] = location.hash.slice(1).split(":").map(Number);
    const about = summary.layers.find((one) => one.layer === layer);
    if (!about || !(n >= 0 && n < about.n_experts)) throw new Error("No such expert. The address must end in #LAYER:EXPERT.");
    const shard = await MXD.load(`data/${layer}/experts-${Math.floor(n / summary.shard)}`);
    const expert = shard[n % summary.shard];
    const texts = await textsOf(expert);
    const place = {layer, n, about, expert, texts};
    document.title = `Expert ${layer}:${n} of ${summary.checkpoint}`;
    $("layer").textContent = `${summary.checkpoint} · layer ${layer} · ${about.kind.replaceAll("_", " ")}`;
    $("title").replaceChildren(`Expert ${n} `, ...badges(place));
    const labels = MXD.labelsOf(summary, layer, n);
    $("labels").hidden = labels.length === 0;
    $("labels").replaceChildren(...labels.flatMap((label) => [make("span", {class: "label", title: label.author ? `by ${label.author}` : null}, label.text), " "]));
    $("up").href = `index.html#layer=${layer}`;
    beside($("previous"), layer, expert.beside[0], "‹");
    beside($("next"), layer, expert.beside[1], "›");
    const parts = expert.count ? [figures, effects, contexts, histogram, bands, similar, steering] : [figures, silence, similar];
    $("content").replaceChildren(...parts.map((part) => part(place)).filter(Boolean));
    $("problem").hidden = true;
    scrollTo(0, 0);
    MXD.ready();
  }

  function beside(link, layer, n, sign) {
    link.textContent = n < 0 ? sign : sign === "‹" ? `‹ ${n}` : `${n} ›`;
    link.setAttribute("aria-label", sign === "‹" ? "previous expert that fires" : "next expert that fires");
    if (n < 0) link.removeAttribute("href");
    else link.href = `#${layer}:${n}`;
  }

  function badges({expert, about}) {
    const rate = expert.count / about.tokens;
    if (expert.count === 0) return [make("span", {class: "badge"}, "dead")];
    if (rate < summary.rates.rare) return [make("span", {class: "badge"}, "rare")];
    if (rate > summary.rates.always) return [make("span", {class: "badge"}, "always on")];
    return [];
  }

  function section(name, help, ...children) {
    const head = make("h2", {}, name);
    return make("section", {}, head, help ? make("p", {class: "muted"}, help) : "", ...children);
  }

  function figures({expert, about}) {
    const cards = [[MXD.percent(expert.count / about.tokens), `of tokens: ${MXD.whole(expert.count)} of ${MXD.whole(about.tokens)}`]];
    if (expert.count) {
      cards.push([MXD.number(expert.mean), "mean coefficient"], [MXD.number(expert.p99), "99th percentile"], [MXD.number(expert.largest), "largest"]);
    }
    if (expert.rank !== undefined) {
      cards.push([MXD.whole(expert.rank), `rank of the weight, ${MXD.whole(about.d_hidden)} × ${MXD.whole(about.d_out)}`], [MXD.number(expert.norm), "norm of the weight"]);
    }
    return make("div", {class: "cards"}, ...cards.map(([figure, name]) => make("div", {class: "card"}, make("strong", {}, figure), make("span", {}, name))));
  }

  function silence({about}) {
    return section("Never active", `The coefficient of this expert is not positive on any of the ${MXD.whole(about.tokens)} tokens of this text, so its effects and contexts are unknown.`);
  }

  // --- tokens promoted and suppressed ---

  function effects({expert}) {
    const most = Math.max(...[...expert.up, ...expert.down].map((row) => Math.abs(row[1])), 1e-12);
    const list = (rows, kind, name) => make(
      "div",
      {},
      make("h3", {}, name),
      make("table", {class: `effects ${kind}`}, make("tbody", {}, ...rows.map(([number, mean, spread]) => {
        const bar = make("span", {class: "bar"});
        bar.style.inlineSize = `${(Math.abs(mean) / most) * 100}%`;
        return make(
          "tr",
          {},
          make("td", {}, MXD.token(tokens.texts[number], {class: "chip", title: `token ${tokens.ids[number]}`})),
          make("td", {class: "meter", "aria-hidden": "true"}, bar),
          make("td", {class: "n"}, MXD.signed(mean), make("span", {class: "muted"}, ` ± ${spread.toFixed(2)}`)),
        );
      }))),
    );
    return section(
      "Effect on the next token",
      "Direct effect of the expert on the logits, on the tokens on which it fires: mean ± standard deviation.",
      make("div", {class: "two"}, list(expert.up, "promoted", "Promoted"), list(expert.down, "suppressed", "Suppressed")),
    );
  }

  // --- activation histogram ---

  function histogram({expert}) {
    const bins = expert.histogram;
    const [width, height, left, bottom] = [960, 170, 44, 30];
    const most = Math.max(...bins);
    const step = (width - left - 20) / bins.length;
    const picture = draw("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "histogram of the positive coefficients"});
    const at = (value) => left + (value / expert.largest) * (width - left - 20);
    for (const [, high, ] of expert.bands.slice(0, -1)) {
      picture.append(draw("line", {x1: at(high), x2: at(high), y1: 10, y2: height - bottom, class: "cut"}));
    }
    bins.forEach((count, i) => {
      const tall = count ? Math.max(1.5, (count / most) * (height - bottom - 14)) : 0;
      const tip = MXD.title(`${MXD.whole(count)} tokens: ${MXD.number((i * expert.largest) / bins.length)} to ${MXD.number(((i + 1) * expert.largest) / bins.length)}`);
      picture.append(draw("rect", {x: left + i * step, y: height - bottom - tall, width: step - 2, height: tall, class: "bar"}, tip));
    });
    picture.append(draw("line", {x1: left - 6, x2: width - 20, y1: height - bottom, y2: height - bottom, class: "axis"}));
    for (let i = 0; i <= 4; i++) {
      const value = (expert.largest * i) / 4;
      picture.append(draw("text", {x: at(value), y: height - bottom + 16, "text-anchor": i === 4 ? "end" : "middle"}, MXD.number(value)));
    }
    picture.append(draw("text", {x: left - 10, y: 18, "text-anchor": "end"}, MXD.whole(most)));
    return section("Coefficients", "Number of tokens by coefficient, on the tokens on which the expert fires. Thin lines mark fifths of these tokens.", make("div", {class: "scroll"}, picture));
  }

  // --- contexts ---

  async function textsOf(expert) {
    const contexts = [...(expert.top ?? []), ...(expert.bands ?? []).flatMap((band) => band[2])];
    const wanted = new Set();
    for (const [position] of contexts) {
      const [from, to] = bounds(position);
      wanted.add(Math.floor(from / summary.text_shard)).add(Math.floor((to - 1) / summary.text_shard));
    }
    return new Map(await Promise.all([...wanted].map(async (shard) => [shard, await MXD.load(`data/text-${shard}`)])));
  }

  function bounds(position) {
    const start = position - (position % summary.data.context);
    const [before, after] = summary.window;
    return [Math.max(start, position - before), Math.min(start + summary.data.context, position + after + 1)];
  }

  function context({expert, texts}, [position, heat]) {
    const [from, to] = bounds(position);
    const around = new Map();
    for (let i = 0; i < heat.length; i += 2) around.set(position + heat[i], heat[i + 1]);
    const line = make("p", {class: "line"});
    if (from % summary.data.context) line.append(make("span", {class: "ws"}, "…"));
    for (let at = from; at < to; at++) {
      const number = texts.get(Math.floor(at / summary.text_shard))[at % summary.text_shard];
      const value = around.get(at) ?? 0;
      const kind = at === position ? "peak" : at > position ? "after" : "";
      const node = MXD.token(tokens.texts[number], {class: value ? `${kind} hot` : kind, title: value ? MXD.number(value) : null});
      if (value) node.style.setProperty("--heat-share", (0.12 + 0.88 * (value / expert.largest)).toFixed(3));
      line.append(node);
    }
    const value = around.get(position);
    const block = Math.floor(position / summary.data.context);
    const where = `block ${block}, token ${position % summary.data.context}`;
    return make("li", {}, make("span", {class: "value n", title: where}, MXD.number(value)), line);
  }

  function contexts(place) {
    const list = make("ol", {class: "contexts", id: "top"}, ...place.expert.top.map((one) => context(place, one)));
    return section("Top contexts", "Tokens with the largest coefficients, at most one per block. The colour shows the coefficient at each token; the box marks the token with the largest.", list);
  }

  function bands(place) {
    const names = ["lowest", "second", "middle", "fourth", "highest"];
    const count = place.expert.bands.length;
    const groups = place.expert.bands.map(([low, high, some], i) => {
      const name = count === names.length ? `${names[i]} fifth` : `part ${i + 1} of ${count}`;
      return make(
        "div",
        {class: "band"},
        make("h3", {}, name, make("span", {class: "muted"}, ` ${MXD.number(low)} to ${MXD.number(high)}`)),
        make("ol", {class: "contexts"}, ...some.map((one) => context(place, one))),
      );
    });
    return section("Examples by quantile", "Tokens drawn at random from each fifth of the tokens on which the expert fires, by coefficient.", ...groups.reverse());
  }

  // --- similar experts, steering ---

  function similar({layer, expert, about}) {
    if (!expert.like.length) return null;
    const what = expert.rank === undefined ? "decoder rows" : "rows of C";
    const items = expert.like.map(([n, cosine, some]) => make(
      "li",
      {},
      make("a", {href: `#${layer}:${n}`}, String(n)),
      make("span", {class: "n muted"}, MXD.signed(cosine)),
      make("span", {class: "promoted"}, ...(some.length ? some.flatMap((number) => [MXD.token(tokens.texts[number], {class: "chip"}), " "]) : [make("span", {class: "muted"}, "dead")])),
    ));
    return section("Most similar experts", `Experts with the largest cosine similarity of their ${what}, among all ${MXD.whole(about.n_experts)} of the layer, with the tokens that each promotes.`, make("ol", {class: "similar"}, ...items));
  }

  function steering({layer, n, expert}) {
    const amount = Number(expert.p99.toPrecision(3));
    const command = `mxd-convert generate ${summary.checkpoint} --prompt "..." --steer ${layer}:${n}:+${amount}`;
    return section("Steering", "This command adds the 99th percentile of the expert's coefficients at every position.", make("pre", {tabindex: "0"}, command));
  }

  function showNotes() {
    MXD.explain($("notes"), [
      ["Text", `${MXD.source(summary)}; fingerprint ${summary.data.fingerprint.slice(0, 16)}.`],
      ["Coefficient", "Activation of the expert on a token. The expert's contribution to the output is proportional to it. The expert fires where it is positive."],
      ["Direct effect", `The expert's contribution to the layer's output, a (c ∗ u), scaled by the final norm at that token, times the unembedding. It does not pass through the layers above. Logits are centred over the vocabulary. The mean is over all tokens on which the expert fires, the standard deviation over ${summary.samples} of them drawn at random.`],
      ["Weight", "D diag(c), the expert's linear map from the hidden units to the output. Norm: Frobenius norm."],
      ["Top contexts", "At most one per block. Contexts whose last eight tokens are equal are shown once. Later tokens, which the expert can't see, are pale."],
      ["Invisible signs", "· is a space, ↵ a line break. <E2 80> are bytes of a character that spans several tokens."],
    ]);
  }

  try {
    [summary, tokens] = await Promise.all([MXD.load("data/summary"), MXD.load("data/tokens")]);
    showNotes();
    addEventListener("hashchange", () => show().catch(MXD.tell));
    await show();
  } catch (error) {
    MXD.tell(error);
  }
})();
