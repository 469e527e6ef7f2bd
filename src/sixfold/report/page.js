(() => {
  const data = JSON.parse(document.getElementById("frames").textContent);
  const player = document.getElementById("player");
  const slider = document.getElementById("moment");
  const now = document.getElementById("now");
  const said = document.getElementById("said");
  const maps = [...player.querySelectorAll("svg")].map((svg) =>
    [...svg.querySelectorAll("path")].map((cell) => {
      const title = cell.querySelector("title");
      return { cell, title, name: title.textContent.split(":")[0] };
    })
  );

  function colour(signal, value) {
    const scale = { linear: (x) => x, log: Math.log, symlog: Math.asinh }[signal.kind];
    const low = scale(signal.low);
    const share = (scale(Math.max(value, signal.low)) - low) / (scale(signal.high) - low);
    const last = data.colours.length - 1;
    return data.colours[Math.round(Math.min(Math.max(share, 0), 1) * last)];
  }

  function show() {
    const frame = Number(slider.value);
    const step = data.steps[frame].toLocaleString("en");
    data.signals.forEach((signal, i) => {
      signal.values[frame].forEach((value, j) => {
        const { cell, title, name } = maps[i][j];
        cell.setAttribute("class", value === null ? "hole" : "cell");
        if (value === null) cell.removeAttribute("fill");
        else cell.setAttribute("fill", colour(signal, value));
        const text = value === null ? "no finite value" : `${value} ${signal.unit}`.trim();
        title.textContent = `${name}: ${text} at step ${step}`;
      });
    });
    now.textContent = `step ${step}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    said.textContent = data.texts[frame] || "No entry in the journal since the moment before.";
  }

  slider.addEventListener("input", show);
  player.hidden = false;
  show();
})();
