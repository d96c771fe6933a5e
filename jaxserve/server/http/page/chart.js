// Chart: lines over time on a canvas, with the newest values beside it as text.

const NUM_POINTS = 120;
const MARGIN_PX = 4;
const NO_VALUE = "–";

export class Chart {
  // names: of its lines, at most two. unit: shown after the values.
  // top: the value at the upper edge; null grows with the values.
  constructor(title, names, { unit = "", top = null } = {}) {
    this.unit = unit;
    this.top = top;
    this.lines = names.map(() => []);
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `${title} in the last minutes; the newest values follow`);
    const caption = document.createElement("figcaption");
    caption.textContent = title;
    const list = document.createElement("dl");
    this.values = names.map((name, index) => {
      const group = document.createElement("div");
      group.className = `line-${index}`;
      const term = document.createElement("dt");
      term.textContent = name;
      const value = document.createElement("dd");
      value.textContent = NO_VALUE;
      group.append(term, value);
      list.append(group);
      return value;
    });
    this.figure = document.createElement("figure");
    this.figure.append(caption, this.canvas, list);
  }

  // One value a line; null leaves a gap.
  push(values) {
    values.forEach((value, index) => {
      const line = this.lines[index];
      line.push(value);
      if (line.length > NUM_POINTS) line.shift();
      this.values[index].textContent = value === null ? NO_VALUE : `${short(value)}${this.unit}`;
    });
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const scale = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(document.documentElement);
    const seen = this.lines.flat().filter((value) => value !== null);
    const top = this.top ?? Math.max(...seen, 1e-9);
    const x = (index) => MARGIN_PX + (index / (NUM_POINTS - 1)) * (width - 2 * MARGIN_PX);
    const y = (value) => height - MARGIN_PX - (value / top) * (height - 2 * MARGIN_PX);
    pen.strokeStyle = style.getPropertyValue("--edge");
    pen.strokeRect(0.5, 0.5, width - 1, height - 1);
    pen.fillStyle = style.getPropertyValue("--quiet");
    pen.font = "11px system-ui, sans-serif";
    pen.fillText(`${short(top)}${this.unit}`, 6, 14);
    pen.lineWidth = 1.8;
    pen.lineCap = "round"; // A value between two gaps is a dot.
    this.lines.forEach((line, number) => {
      pen.strokeStyle = style.getPropertyValue(`--line-${number}`);
      pen.setLineDash(number ? [5, 3] : []);
      pen.beginPath();
      const first = NUM_POINTS - line.length;
      line.forEach((value, index) => {
        if (value === null) return;
        const follows = index > 0 && line[index - 1] !== null;
        const at = [x(first + index), y(Math.min(value, top))];
        if (follows) pen.lineTo(...at);
        else {
          pen.moveTo(...at);
          pen.lineTo(at[0] + 0.1, at[1]);
        }
      });
      pen.stroke();
    });
  }
}

function short(value) {
  if (value === 0) return "0";
  return Math.abs(value) < 100 ? String(Number(value.toPrecision(3))) : String(Math.round(value));
}
