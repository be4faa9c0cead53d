// What tests/test_pages.py asks of a page in a browser: put into it before it loads, as `checks`.
globalThis.checks = (() => {
  const style = (e) => getComputedStyle(e);
  const name = (e) => e.outerHTML.slice(0, 120);
  const scrolls = (e) => ["auto", "scroll"].includes(style(e).overflowX);
  const overflows = (e) => e.scrollWidth > e.clientWidth + 1;
  const withinScroll = (e) => e !== null && (scrolls(e) || withinScroll(e.parentElement));

  // --- Contrast, as WCAG 2 defines it: colours are [red, green, blue, alpha] ---

  const parse = (text) => {
    const numbers = (text.match(/[\d.]+/g) ?? []).map(Number);
    return numbers.length < 4 ? [...numbers, 1] : numbers;
  };
  const luminance = ([red, green, blue]) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = [red, green, blue].map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    if (e === null) return [255, 255, 255, 1];
    const colour = parse(style(e).backgroundColor);
    return colour[3] === 1 ? colour : ground(e.parentElement);
  };
  // Of a colour, with an opacity besides its own, against what lies behind an element's content.
  const contrast = (text, opacity, e) => {
    const [colour, behind] = [parse(text), ground(e)], alpha = opacity * colour[3];
    const pair = [luminance(behind.map((v, i) => alpha * colour[i] + (1 - alpha) * v)), luminance(behind)];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  };

  return {
    // What reaches out of the window or is cut off by its frame, apart from what lies in something that scrolls.
    layout(width) {
      const all = [...document.body.querySelectorAll("*:not(svg *), svg text")].filter(
        (e) => e.checkVisibility() && !withinScroll(e.parentElement) && !e.closest(".visually-hidden"),
      );
      const out = all.filter((e) => {
        const box = e.getBoundingClientRect();
        return box.width && (box.right > width + 1 || box.left < -1);
      });
      const cut = all.filter((e) => ["hidden", "clip"].includes(style(e).overflowX) && overflows(e));
      const page = document.documentElement.scrollWidth > width || innerWidth !== width;
      const faults = [...out.map((e) => `wide: ${name(e)}`), ...cut.map((e) => `cut off: ${name(e)}`)];
      return page ? [...faults, "wide: the page"] : faults;
    },

    // Images that do not load, those in drawings among them.
    async images() {
      const faults = [];
      for (const image of document.querySelectorAll("img, svg image")) {
        const shown = image instanceof HTMLImageElement ? image : new Image();
        if (shown !== image) shown.src = image.getAttribute("href");
        await shown.decode().catch(() => faults.push(`broken: ${name(image)}`));
      }
      return faults;
    },

    // Texts, and marks of charts and keys, that are too faint. Grid lines do not count, nor areas with a line of their own.
    faint() {
      const faults = [];
      const look = (e, least, colours) => {
        let opacity = 1;
        for (let up = e; up !== null; up = up.parentElement) opacity *= style(up).opacity;
        const seen = colours.filter(([colour]) => colour !== "none" && parse(colour)[3]);
        const best = Math.max(...seen.map(([colour, share]) => contrast(colour, opacity * share, e)));
        if (seen.length && best < least) faults.push(`faint: ${best.toFixed(2)}: ${name(e)}`);
      };
      for (const e of document.body.querySelectorAll("*:not(style, script, title)")) {
        const worded = [...e.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
        if (worded && e.checkVisibility()) look(e, 4.5, [[e.ownerSVGElement ? style(e).fill : style(e).color, 1]]);
      }
      const probe = document.body.appendChild(document.createElement("i"));
      probe.style.color = "var(--line)";
      const grid = style(probe).color;
      probe.remove();
      for (const e of document.querySelectorAll(".chart svg :is(path, use, circle, rect, line, polygon, polyline)")) {
        if (e.closest("defs, clipPath, [id*=FillBetween]")) continue;
        const { fill, fillOpacity, stroke, strokeOpacity } = style(e);
        look(e, 3, [[fill, fillOpacity], [stroke, strokeOpacity]].filter(([colour]) => colour !== grid));
      }
      for (const e of document.querySelectorAll(".key")) {
        const { borderColor, outlineColor, outlineStyle } = style(e);
        look(e, 3, [[borderColor, 1], [outlineStyle === "none" ? "none" : outlineColor, 1]]);
      }
      return faults;
    },

    // Rows of tables that have no header of their own.
    headless() {
      const rows = [...document.querySelectorAll("tbody tr")].filter((row) => !row.querySelector("th[scope]"));
      return rows.map((row) => `headless: ${name(row)}`);
    },

    // Numbers all that can be operated or scrolled, in the order of the page -> [{name, kind}, ...].
    stops() {
      const operated = "a[href], summary, button, input, select, textarea, audio, video, [tabindex], [contenteditable]";
      const wide = (e) => scrolls(e) && overflows(e);
      const visible = [...document.body.querySelectorAll("*")].filter((e) => e.checkVisibility());
      return visible.filter((e) => e.matches(operated) || wide(e)).map((e, n) => {
        e.dataset.stop = n;
        // Chromium lets Tab reach what scrolls by itself, which other browsers do not.
        const kind = wide(e) ? (e.tabIndex < 0 ? "unfocusable" : "scroll") : e.matches("summary") ? "summary" : "other";
        return { name: name(e), kind: e.matches("a[href^='#']") ? "jump" : kind };
      });
    },

    // The stop that has the focus, and whether an outline shows it.
    focused() {
      const e = document.activeElement, { outlineStyle, outlineWidth, outlineColor } = style(e);
      const outlined = !["none", "auto"].includes(outlineStyle) && parseFloat(outlineWidth) >= 2;
      return [e.dataset.stop ?? "", outlined && contrast(outlineColor, 1, e.parentElement) >= 3];
    },
  };
})();
