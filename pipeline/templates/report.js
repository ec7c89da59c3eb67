"use strict";
(() => {
  const find = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Text from the lake only ever enters the page as text nodes and attributes, never as markup.
  const make = (tag, text = "", className = "") => {
    const element = document.createElement(tag);
    element.textContent = text;
    element.className = className;
    return element;
  };

  // Tooltips -------------------------------------------------------------------------------------
  const tip = find(".tip");
  const words = { keep: "kept", duplicate: "duplicate", reject: "rejected", error: "unmeasured", undecided: "undecided" };
  const place = (event, text) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const above = event.clientY - box.height - 12;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 8 ? above : event.clientY + 18}px`;
  };
  const binUnder = (event, chart) => {
    chart.bins ??= JSON.parse(chart.dataset.bins);
    const box = chart.getBoundingClientRect();
    // The plot has 4 of 360 units of margin on either side.
    const x = ((event.clientX - box.left) / box.width * 360 - 4) / 352;
    const bin = chart.bins[Math.floor(x * chart.bins.length)];
    if (!bin) return "";
    const counts = Object.entries(bin[1]).map(([verdict, count]) => `${count.toLocaleString("en")} ${words[verdict] ?? verdict}`);
    return [bin[0], ...(counts.length ? counts : ["no clips"])].join("\n");
  };
  document.addEventListener("pointermove", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    const chart = target?.closest(".histogram");
    const text = chart ? binUnder(event, chart) : target?.closest("[data-tip]")?.dataset.tip;
    if (text) place(event, text); else tip.hidden = true;
  });
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // Filter of the galleries ----------------------------------------------------------------------
  const captions = (card) => find("template", card)?.content.querySelector(".captions")?.textContent ?? "";
  const cards = all("article.clip").map((element) => ({
    element,
    verdict: element.dataset.verdict,
    reasons: JSON.parse(element.dataset.reasons),
    text: [element.textContent, element.dataset.clip, find(".file", element)?.title ?? "", captions(element)].join(" ").toLowerCase(),
  }));
  const tools = find(".tools");
  const select = find("select", tools);
  const search = find("input", tools);
  let verdict = "";
  const unfolded = new Set();

  const show = () => {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      const fits = (!verdict || card.verdict === verdict)
        && (!select.value || card.reasons.includes(select.value))
        && wanted.every((word) => card.text.includes(word));
      card.element.hidden = !fits;
      shown += fits;
    }
    // Unasked, a gallery shows its first rows; a filter shows all that it finds.
    const asked = Boolean(verdict || select.value || wanted.length);
    for (const gallery of all(".gallery")) {
      gallery.hidden = !find(".clip:not([hidden])", gallery);
      const many = all(".clip", gallery).length > (gallery.dataset.gallery === "duplicate" ? 6 : 12);
      const short = many && !asked && !unfolded.has(gallery);
      gallery.classList.toggle("short", short);
      find(".unfold", gallery).hidden = !short;
    }
    find(".nothing").hidden = shown > 0 || cards.length === 0;
    find("output", tools).textContent = shown === cards.length ? "" : `${shown} of ${cards.length} shown here`;
    for (const button of all("[data-show]", tools)) button.setAttribute("aria-pressed", String(button.dataset.show === verdict));
  };

  if (cards.length) {
    tools.hidden = false;
    const counts = new Map();
    for (const card of cards) for (const reason of new Set(card.reasons)) counts.set(reason, (counts.get(reason) ?? 0) + 1);
    for (const reason of [...counts.keys()].sort()) {
      const option = make("option", reason);
      option.value = reason;
      select.append(option);
    }
    for (const button of all("[data-show]", tools)) button.addEventListener("click", () => { verdict = button.dataset.show; show(); });
    select.addEventListener("change", show);
    search.addEventListener("input", show);
    for (const gallery of all(".gallery")) find(".unfold", gallery).addEventListener("click", () => { unfolded.add(gallery); show(); });
    show();
  }
  for (const link of all(".pick")) {
    link.addEventListener("click", () => {
      verdict = "";
      search.value = "";
      select.value = link.dataset.reason;
      if (select.selectedIndex < 0) select.value = "";
      show();
    });
  }

  // All scores of one clip -----------------------------------------------------------------------
  const details = JSON.parse(find("#details").textContent);
  const dialog = find("dialog");
  const written = (value) => {
    if (value === null || value === undefined) return "–";
    if (value === true) return "yes";
    if (value === false) return "no";
    return typeof value === "number" ? value.toLocaleString("en", { maximumSignificantDigits: 5 }) : String(value);
  };
  const fails = (value, limit) => limit.alone && typeof value === "number"
    && (limit.inclusive && value === limit.threshold || (limit.side === "below" ? value < limit.threshold : value > limit.threshold));
  const open = (card) => {
    const content = find(".content", dialog);
    const inner = make("div", "", "inner");
    const copied = (selector) => { const found = find(selector, card); if (found) inner.append(found.cloneNode(true)); };
    content.replaceChildren((find(".pair", card) ?? find(".frames", card)).cloneNode(true), inner);
    copied(".line"); copied(".reasons");
    inner.append(make("p", find(".file", card).title, "id"));
    copied(".prompt");
    const id = make("p", "clip ", "id");
    id.append(make("code", card.dataset.clip));
    inner.append(id);
    copied(".said");
    const said = find("template", card);
    if (said) inner.append(said.content.cloneNode(true));
    const values = details.clips[card.dataset.clip] ?? [];
    const table = make("table");
    const body = make("tbody");
    let operator = "";
    details.columns.forEach((column, index) => {
      if (column.operator !== operator) {
        operator = column.operator;
        const heading = make("th", operator || "clip");
        heading.colSpan = 3;
        const row = make("tr", "", "operator");
        row.append(heading);
        body.append(row);
      }
      const row = make("tr");
      const name = make("td");
      name.append(make("code", column.name));
      if (column.meaning) name.dataset.tip = column.meaning;
      row.append(name, make("td", `${written(values[index])}${column.unit && values[index] !== null ? ` ${column.unit}` : ""}`, "num"));
      row.append(make("td", column.limits.length ? `rejects ${column.limits.map((limit) => limit.words).join(", ")}` : "", "limit"));
      if (column.limits.some((limit) => fails(values[index], limit))) row.className = "fails";
      body.append(row);
    });
    table.append(body);
    inner.append(table);
    dialog.showModal();
    dialog.scrollTop = 0;
  };
  for (const card of cards) {
    const more = find(".more", card.element);
    more.hidden = false;
    more.addEventListener("click", () => open(card.element));
  }
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
})();
