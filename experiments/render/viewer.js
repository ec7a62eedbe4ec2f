"use strict";
// An episode of rigid bodies, looked at from any side. Each shape is drawn as the outline of its convex hull, far ones first.
const scene = JSON.parse(document.getElementById("scene").textContent);
const canvas = document.getElementById("picture");
const pen = canvas.getContext("2d");
const play = document.getElementById("play");
const slider = document.getElementById("time");
const speed = document.getElementById("speed");
const told = document.getElementById("told");

const numbers = (text) => new Float32Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
const place = numbers(scene.place), turn = numbers(scene.turn), target = numbers(scene.target);
const frames = scene.step.length, shapes = scene.shapes;
const start = { azimuth: scene.azimuth, elevation: scene.elevation, height: scene.height };
let view = { ...start };
let at = 0, running = true, since = 0, last = null;

const circle = Array.from({ length: 24 }, (_, k) => [Math.cos(k * Math.PI / 12), Math.sin(k * Math.PI / 12)]);
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];

// Rows: what points right, up, and away from the camera.
function axes() {
  const a = view.azimuth * Math.PI / 180, e = view.elevation * Math.PI / 180;
  const away = [Math.cos(e) * Math.cos(a), Math.cos(e) * Math.sin(a), Math.sin(e)];
  const right = [Math.sin(a), -Math.cos(a), 0];
  const up = [
    right[1] * away[2] - right[2] * away[1], right[2] * away[0] - right[0] * away[2], right[0] * away[1] - right[1] * away[0],
  ];
  return [right, up, away];
}

// Points in the frame of the picture: right, up, depth. `columns` are the shape's own axes there, `middle` its place.
function points(shape, columns, middle) {
  const [a, b, c] = shape.size;
  const from = (x, y, z) => [0, 1, 2].map((k) => middle[k] + columns[0][k] * x + columns[1][k] * y + columns[2][k] * z);
  if (shape.kind === "sphere" || shape.kind === "capsule") {
    const ends = shape.kind === "capsule" ? [from(0, 0, b), from(0, 0, -b)] : [middle];
    return ends.flatMap((end) => circle.map(([x, y]) => [end[0] + a * x, end[1] + a * y, end[2]]));
  }
  if (shape.kind === "cylinder") return circle.flatMap(([x, y]) => [from(a * x, a * y, b), from(a * x, a * y, -b)]);
  if (shape.kind === "ellipsoid") {
    return circle.map(([x, y]) => {
      const way = columns.map((column) => x * column[0] + y * column[1]);
      const long = Math.hypot(a * way[0], b * way[1], c * way[2]) || 1;
      return from(a * a * way[0] / long, b * b * way[1] / long, c * c * way[2] / long);
    });
  }
  if (shape.kind === "mesh") return shape.vertices.map((vertex) => from(...vertex));
  return [-1, 1].flatMap((x) => [-1, 1].flatMap((y) => [-1, 1].map((z) => from(a * x, b * y, c * z))));
}

function hull(all) {
  const sorted = all.slice().sort((p, q) => p[0] - q[0] || p[1] - q[1]);
  const chain = (sequence) => {
    const kept = [];
    for (const p of sequence) {
      while (kept.length > 1) {
        const [q, r] = [kept[kept.length - 2], kept[kept.length - 1]];
        if ((r[0] - q[0]) * (p[1] - q[1]) - (r[1] - q[1]) * (p[0] - q[0]) > 0) break;
        kept.pop();
      }
      kept.push(p);
    }
    return kept.slice(0, -1);
  };
  return [...chain(sorted), ...chain(sorted.reverse())];
}

function draw() {
  const wide = canvas.clientWidth, high = canvas.clientHeight, fine = window.devicePixelRatio || 1;
  canvas.width = wide * fine;
  canvas.height = high * fine;
  pen.setTransform(fine, 0, 0, fine, 0, 0);
  pen.clearRect(0, 0, wide, high);
  const frame = Math.floor(at), rows = axes(), scale = high / view.height;
  const middle = Array.from(target.subarray(3 * frame, 3 * frame + 3));
  const pixel = (p) => [wide / 2 + p[0] * scale, high / 2 - p[1] * scale];
  const seen = (p) => { const d = p.map((x, k) => x - middle[k]); return rows.map((row) => dot(row, d)); };
  if (scene.floor !== null) drawFloor(pixel, seen, middle);
  const outlines = shapes.map((shape, g) => {
    const i = frame * shapes.length + g, [w, x, y, z] = turn.subarray(4 * i, 4 * i + 4);
    const columns = [
      [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)],
      [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)],
      [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)],
    ].map((column) => rows.map((row) => dot(row, column)));
    const all = points(shape, columns, seen(Array.from(place.subarray(3 * i, 3 * i + 3))));
    const depths = all.map((p) => p[2]);
    const depth = Math.min(...depths) + depths.reduce((sum, d) => sum + d, 0) / depths.length;
    return { depth, shape, corners: hull(all) };
  });
  outlines.sort((p, q) => q.depth - p.depth);
  for (const { shape, corners } of outlines) {
    pen.beginPath();
    corners.forEach((corner) => pen.lineTo(...pixel(corner)));
    pen.closePath();
    pen.fillStyle = shape.color;
    pen.strokeStyle = shape.edge;
    pen.fill();
    pen.stroke();
  }
  slider.value = frame;
  told.textContent = `step ${scene.step[frame]} of ${scene.step[frames - 1]}, return so far ${scene.return[frame].toFixed(2)}`;
}

function drawFloor(pixel, seen, middle) {
  const tile = 10 ** Math.round(Math.log10(view.height / 4)), reach = 12;
  const from = [0, 1].map((k) => Math.round(middle[k] / tile));
  pen.lineWidth = 1;
  for (let k = -reach; k <= reach; k++) {
    for (const [p, q] of [[[k, -reach], [k, reach]], [[-reach, k], [reach, k]]]) {
      pen.strokeStyle = (p[0] === p[1] ? 0 : (p[0] === k ? from[0] : from[1]) + k) % 5 ? "#dddddd" : "#aaaaaa";
      pen.beginPath();
      for (const [i, j] of [p, q]) pen.lineTo(...pixel(seen([(from[0] + i) * tile, (from[1] + j) * tile, scene.floor])));
      pen.stroke();
    }
  }
}

function tick(now) {
  if (running && last !== null) {
    since += (now - last) / 1000 * Number(speed.value);
    while (at < frames - 1 && since >= scene.step[at + 1] * scene.seconds) at++;
    // The end is looked at for a second before it starts again.
    if (at === frames - 1 && since > scene.step[at] * scene.seconds + Number(speed.value)) { at = 0; since = 0; }
  }
  last = now;
  draw();
  requestAnimationFrame(tick);
}

play.addEventListener("click", () => { running = !running; play.textContent = running ? "pause" : "play"; });
slider.addEventListener("input", () => { at = Number(slider.value); since = scene.step[at] * scene.seconds; });
document.getElementById("back").addEventListener("click", () => { view = { ...start }; });
canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
canvas.addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  view.azimuth -= event.movementX * 0.5;
  view.elevation = Math.max(-90, Math.min(0, view.elevation - event.movementY * 0.5));
});
canvas.addEventListener("wheel", (event) => { event.preventDefault(); view.height *= Math.exp(event.deltaY * 0.001); }, { passive: false });
requestAnimationFrame(tick);
