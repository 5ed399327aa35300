"use strict";
// One model as the page shows it: its heads as small maps, one of them large, and what a query looks at.

class View {
  constructor(model) {
    this.root = document.getElementById("view-template").content.firstElementChild.cloneNode(true);
    this.part = name => this.root.querySelector(name);
    this.map = new HeadMap(this.part("canvas.map"));
    this.what = "weights";
    this.part(".pick-model").innerHTML = models.map(model => `<option value="${model.index}">${esc(model.name)}</option>`).join("");
    this.part(".pick-model").onchange = event => { this.setModel(models[event.target.value]); queryChanged(); };
    this.part(".pick-values").onchange = event => { this.what = event.target.value; this.showHead(); this.showQuery(); };
    this.part(".lock").onclick = () => setLocked(!state.locked);
    exportButtons(this.part('[data-what="map"]'), "map", () => mapPicture(this.model, this.head, this.what));
    exportButtons(this.part('[data-what="overview"]'), "heads", () => overviewPicture(this.model));
    this.listen();
    this.seen = new IntersectionObserver(entries => {
      for (const entry of entries) if (entry.isIntersecting) this.paintThumb(entry.target);
    }, { rootMargin: "200px" });
    this.setModel(model);
  }

  setModel(model) {
    this.model = model;
    this.head = bestHead(model);
    this.part(".pick-model").value = model.index;
    this.part(".kind").textContent = model.kind;
    this.part(".kind").className = `kind kind-${model.kind.toLowerCase()}`;
    this.part(".warning").hidden = !model.untrained;
    this.root.setAttribute("aria-label", model.name);
    if (this.root.isConnected) this.render();
  }

  render() {
    this.showThumbs();
    this.showHead();
    this.makeStrip();
    this.showQuery();
  }

  // the small maps ----------------------------------------------------------

  showThumbs() {
    const { model } = this, holder = this.part(".thumbs"), grid = state.order === "grid";
    const heads = Array.from({ length: model.count }, (_, head) => head);
    const shown = grid ? heads : sortedHeads(model, state.shown).filter(head => state.labels.has(model.label(head)));
    holder.className = `thumbs ${grid ? "grid" : "ranked"}`;
    this.part(".choice").classList.toggle("broad", model.heads > 16);
    holder.style.setProperty("--heads", model.heads);
    holder.style.setProperty("--thumb", `${Math.max(26, Math.min(92, 396 / model.layers))}px`); // all layers on one screen
    holder.setAttribute("aria-label", `Heads of ${model.name}, ${grid ? "layer by layer" : `by ${SCORES[state.shown].name}`}`);
    this.seen.disconnect();
    const columns = grid ? ['<span class="corner"></span>', ...Array.from({ length: model.heads }, (_, head) => `<span class="column">H${head}</span>`)] : [];
    holder.innerHTML = columns.join("") + shown.map(head => {
      const label = model.label(head), faded = !state.labels.has(label);
      const row = grid && head % model.heads === 0 ? `<span class="row">L${model.layer(head)}</span>` : "";
      const value = model.score(head, state.shown);
      const says = `layer ${model.layer(head)} head ${head % model.heads}, ${labelName(label)}, ${SCORES[state.shown].name} ${showScore(value, state.shown)}`;
      return `${row}<button type="button" class="thumb${faded ? " faded" : ""}" data-head="${head}" tabindex="-1" aria-pressed="false" aria-label="${esc(says)}"
        title="${esc(says)}"><span class="paper"></span><span class="caption">${grid ? "" : `<b>${model.nameOf(head)}</b>`}<i class="dot label-${esc(label || "none")}"></i><span
        class="value">${value === null ? "" : showScore(value, state.shown)}</span></span></button>`;
    }).join("");
    if (!shown.length) holder.innerHTML = '<p class="quiet">No head of this model has a label that is switched on.</p>';
    for (const thumb of holder.querySelectorAll(".thumb")) this.seen.observe(thumb);
    this.markThumb();
  }

  paintThumb(thumb) {
    this.seen.unobserve(thumb);
    thumb.querySelector(".paper").replaceChildren(paint(this.model, Number(thumb.dataset.head), "weights", 64));
  }

  markThumb(focus = false) {
    const thumbs = [...this.root.querySelectorAll(".thumb")];
    const chosen = thumbs.find(thumb => Number(thumb.dataset.head) === this.head);
    for (const thumb of thumbs) {
      thumb.setAttribute("aria-pressed", String(thumb === chosen));
      thumb.tabIndex = thumb === (chosen || thumbs[0]) ? 0 : -1;
    }
    if (focus) chosen?.focus();
  }

  setHead(head, focus = false) {
    this.head = head;
    this.markThumb(focus);
    this.showHead();
    this.showQuery();
  }

  // one head ----------------------------------------------------------------

  showHead() {
    const { model, head } = this, label = model.label(head), pick = this.part(".pick-values");
    pick.parentElement.hidden = !model.splitAt.size;
    for (const option of pick.options) option.disabled = option.value !== "weights" && !model.split(head);
    if (this.what !== "weights" && !model.split(head)) this.what = "weights";
    pick.value = this.what;
    for (const which of this.root.querySelectorAll(".which")) which.textContent = model.nameOf(head);
    this.part(".chosen .label").className = `label label-${label || "none"}`;
    const onText = model.scoreOf.get(head)?.on_text?.label;
    this.part(".chosen .label").textContent = onText && onText !== label ? `${label && `${label}, `}${onText} on text` : labelName(label);
    this.part(".facts").innerHTML = Object.keys(SCORES).filter(key => model.score(head, key) !== null).map(key => {
      const value = model.score(head, key), bar = SCORES[key].is_loss || value < 0 ? "" : `<i style="width:${(100 * Math.min(1, value)).toFixed(1)}%"></i>`;
      return `<div><dt title="${esc(SCORES[key].name)}">${esc(SCORES[key].short)}</dt><dd class="bar">${bar}</dd><dd>${showScore(value, key)}</dd></div>`;
    }).join("") || '<div class="quiet">no scores in this report</div>';
    this.map.show(model, head, this.what);
    this.map.canvas.setAttribute("aria-label", `Attention of ${model.nameOf(head)} of ${model.name}. Arrow keys move the query and the key, Enter locks.`);
  }

  makeStrip() {
    this.part(".strip").replaceChildren(...this.model.tokensText.map((token, i) => {
      const span = document.createElement("span");
      span.textContent = clip(visible(token), 24);
      span.title = `${i}: ${visible(token)}`;
      span.dataset.position = i;
      return span;
    }));
  }

  // what the query looks at ---------------------------------------------------

  /** The query and the key of this view: the page's, within this model's sequence. */
  here() {
    const q = Math.min(state.query, this.model.T - 1);
    return { q, k: state.key === null || state.key > q ? this.model.topKey(this.head, q) : state.key };
  }

  showQuery() {
    const { model, head } = this, { q, k } = this.here(), text = model.tokensText;
    this.map.mark(q, k, state.locked);
    const token = i => `<span class="token">${esc(clip(visible(text[i]), 18))}</span>`;
    const beyond = state.query > q ? ` <span class="quiet">(this sequence ends at ${q})</span>` : "";
    this.part(".asks").innerHTML = `Query <b>${q}</b> ${token(q)}${beyond} gives key <b>${k}</b> ${token(k)} <b class="weight">${fixed(model.weight(head, q, k), 3)}</b>`;
    const keys = Array.from({ length: q + 1 }, (_, i) => i).sort((a, b) => model.weight(head, q, b) - model.weight(head, q, a) || a - b)
      .slice(0, 8).filter((key, i) => !i || model.weight(head, q, key) > 0);
    this.part(".keys").innerHTML = keys.map(key => {
      const weight = model.weight(head, q, key);
      return `<li data-key="${key}"${key === k ? ' class="here"' : ""}><span class="place">${key}</span><span class="what"><span
        class="token" title="${esc(visible(text[key]))}">${esc(clip(visible(text[key]), 18))}</span><span class="role">${model.role(q, key)}</span></span><span class="bar"><i style="width:${(100 * weight).toFixed(1)}%"></i></span><span class="weight">${fixed(weight, 3)}</span></li>`;
    }).join("");
    this.showSplit(q, k);
    this.part(".lock").textContent = state.locked ? "Locked: click to follow the pointer" : "Lock this query";
    this.part(".lock").setAttribute("aria-pressed", String(state.locked));
    const spans = this.part(".strip").children;
    for (let i = 0; i < spans.length; i++) {
      const weight = i <= q ? model.weight(head, q, i) : 0;
      spans[i].className = i > q ? "later" : i === q ? "query" : i === k ? "key" : "";
      spans[i].style.background = i > q ? "" : weightColor(weight);
      spans[i].style.color = i > q ? "" : inkOn(weight);
    }
    if (state.locked) this.part(".spoken").textContent = `Query ${q} ${visible(text[q])}: ${fixed(model.weight(head, q, k), 2)} on key ${k} ${visible(text[k])}`;
  }

  /** MLA: the logit as content plus RoPE. */
  showSplit(q, k) {
    const { model, head } = this, split = model.split(head), holder = this.part(".split");
    if (!model.splitAt.size) { holder.innerHTML = ""; return; }
    if (!split) {
      holder.innerHTML = `<p class="quiet">The parts of the logit were kept for other heads: ${[...model.splitAt.keys()].slice(0, 6).map(other => model.nameOf(other)).join(", ")}${model.splitAt.size > 6 ? " …" : ""}</p>`;
      return;
    }
    const parts = ["content", "rope", "sum"].map(name => [name, split[name][at(q, k)]]);
    let most = 1e-6; // of the row, so that bars of one query compare
    for (let i = at(q, 0); i <= at(q, q); i++) most = Math.max(most, Math.abs(split.content[i]), Math.abs(split.rope[i]), Math.abs(split.sum[i]));
    holder.innerHTML = `<p class="quiet">Its logit, before the softmax</p>` + parts.map(([name, value]) => {
      const half = 50 * Math.abs(value) / most;
      return `<div class="part part-${name}"><span>${{ content: "content", rope: "RoPE", sum: "sum" }[name]}</span><span class="axis"><i style="left:${value < 0 ? 50 - half : 50}%;width:${half}%"></i></span>
        <b>${signed(value, 2)}</b></div>`;
    }).join("");
  }

  // hands ---------------------------------------------------------------------

  listen() {
    const canvas = this.map.canvas;
    const point = event => {
      const cell = this.map.cellAt(event);
      if (cell) setQuery(cell.q, cell.k);
    };
    canvas.addEventListener("pointermove", event => { if (!state.locked) point(event); });
    canvas.addEventListener("click", event => {
      if (!this.map.cellAt(event)) return;
      if (!state.locked) point(event);
      setLocked(!state.locked);
    });
    canvas.addEventListener("keydown", event => {
      const { q, k } = this.here(), far = event.shiftKey ? 8 : 1;
      const moves = { ArrowUp: [q - far, k], ArrowDown: [q + far, k], ArrowLeft: [q, k - far], ArrowRight: [q, k + far],
                      Home: [q, 0], End: [q, q], PageUp: [q - 16, k], PageDown: [q + 16, k] };
      const move = moves[event.key];
      if (move) {
        const row = Math.max(0, Math.min(this.model.T - 1, move[0]));
        setQuery(row, Math.max(0, Math.min(row, move[1])));
      } else if (event.key === "Enter" || event.key === " ") setLocked(!state.locked);
      else if (event.key === "Escape") setLocked(false);
      else return;
      event.preventDefault();
    });
    this.part(".strip").addEventListener("pointerover", event => {
      const place = event.target.dataset.position;
      if (place !== undefined && !state.locked) setQuery(Number(place), null);
    });
    this.part(".strip").addEventListener("click", event => {
      const place = event.target.dataset.position;
      if (place === undefined) return;
      setQuery(Number(place), null);
      setLocked(true);
    });
    this.part(".keys").addEventListener("click", event => {
      const row = event.target.closest("li");
      if (row) setQuery(this.here().q, Number(row.dataset.key));
    });
    const thumbs = this.part(".thumbs");
    thumbs.addEventListener("click", event => {
      const thumb = event.target.closest(".thumb");
      if (thumb) this.setHead(Number(thumb.dataset.head));
    });
    thumbs.addEventListener("keydown", event => {
      const all = [...thumbs.querySelectorAll(".thumb")], here = all.indexOf(document.activeElement);
      const across = state.order === "grid" ? this.model.heads : all.filter(thumb => thumb.offsetTop === all[0].offsetTop).length;
      const next = { ArrowLeft: here - 1, ArrowRight: here + 1, ArrowUp: here - across, ArrowDown: here + across, Home: 0, End: all.length - 1 }[event.key];
      if (here < 0 || next === undefined) return;
      event.preventDefault();
      if (all[next]) this.setHead(Number(all[next].dataset.head), true);
    });
  }
}

/** Heads by a score, best first; heads without one last. */
function sortedHeads(model, key) {
  const value = head => model.score(head, key) ?? -Infinity;
  return Array.from({ length: model.count }, (_, head) => head).sort((a, b) => value(b) - value(a) || a - b);
}

/** The head to begin with: the one that is most an induction head. */
const bestHead = model => sortedHeads(model, "induction")[0];
