"use strict";

const at = (id) => document.getElementById(id);
const canvas = at("picture");
const drawing = canvas.getContext("2d");

// What each key does in one frame; several that are held add up.
const MOVES = {
  w: { forward: 1 }, arrowup: { forward: 1 },
  s: { forward: -1 }, arrowdown: { forward: -1 },
  a: { turn: 1 }, arrowleft: { turn: 1 },
  d: { turn: -1 }, arrowright: { turn: -1 },
  q: { forward: 1, turn: 1 }, e: { forward: 1, turn: -1 },
};
const KEPT_LATENCIES = 64, KEPT_DIFFERENCES = 120, RECONNECT_MS = 1000;

let socket = null, world = null, plays = false, recording = false, drawn = 0, drawing_busy = false, waiting = null;
let wish = 0, stream = null, camera_timer = null;
const held = new Set(), sent_at = new Map(), latencies = [], differences = [];

function connect() {
  socket = new WebSocket(location.origin.replace(/^http/, "ws") + "/frames");
  socket.binaryType = "arraybuffer";
  socket.onmessage = (event) => (typeof event.data === "string" ? hear(JSON.parse(event.data)) : frame(event.data));
  socket.onclose = (event) => {
    plays = false;
    held.clear();
    at("role").textContent = event.reason ? `closed: ${event.reason}` : "the server does not answer; trying again";
    show_controls();
    setTimeout(connect, RECONNECT_MS);
  };
}

function send(message) {
  if (socket.readyState === WebSocket.OPEN) socket.send(typeof message === "object" && !(message instanceof Blob)
    ? JSON.stringify(message) : message);
}

function hear(line) {
  if (line.world) begin(line.world);
  if (line.role) {
    plays = line.role === "player";
    at("role").textContent = plays ? "you play" : "somebody else plays; you watch, and play when they leave";
    at("watchers").textContent = line.watchers;
    show_controls();
  }
  if (line.facts) show_facts(line.facts);
  if (line.error) say(line.error, true);
}

function begin(about) {
  world = about;
  document.title = `${about.title} - halfstep live`;
  at("title").textContent = about.title;
  canvas.width = about.width;
  canvas.height = about.height;
  at("keys").hidden = about.source !== "keys";
  at("camera").hidden = about.source !== "camera";
  [at("steps").min, at("steps").max] = about.steps;
  show_controls();
  canvas.focus();
}

function show_controls() {
  for (const control of document.querySelectorAll("aside button, aside input")) control.disabled = !plays;
}

function show_facts(facts) {
  const frame_ms = facts.milliseconds.predict;
  at("fps").textContent = facts.frames_per_second.toFixed(1);
  at("predict").textContent = frame_ms ? `${frame_ms.p50.toFixed(0)} / ${frame_ms.p99.toFixed(0)} ms` : "";
  for (const button of at("precision").children) button.classList.toggle("on", button.dataset.precision === facts.precision);
  if (document.activeElement !== at("steps")) at("steps").value = facts.steps;
  if (document.activeElement !== at("seed")) at("seed").value = facts.seed;
  recording = facts.recorded.on;
  at("record").textContent = recording ? `stop (${facts.recorded.frames})` : "record";
  at("record").classList.toggle("on", recording);
  at("download").hidden = recording || facts.recorded.frames === 0;
  const spoiled = Object.entries(facts.not_finite).map(([name, count]) => `${count} not finite in ${name}`);
  const counted = [["skipped", facts.skipped], ["dropped", facts.dropped]].filter(([, count]) => count)
    .map(([name, count]) => `${count} ${name}`);
  at("problems").textContent = [...spoiled, ...counted, facts.launches === "eager" ? "" : facts.launches]
    .filter(Boolean).join(", ");
}

function frame(buffer) {
  const length = new DataView(buffer).getUint16(0);
  const facts = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 2, length)));
  waiting = { facts, jpeg: new Blob([new Uint8Array(buffer, 2 + length)], { type: "image/jpeg" }) };
  if (!drawing_busy) draw();
}

// The newest frame wins here too: one that came while another was being drawn replaces the one that waits.
async function draw() {
  drawing_busy = true;
  while (waiting) {
    const { facts, jpeg } = waiting;
    waiting = null;
    const picture = await createImageBitmap(jpeg);
    drawing.drawImage(picture, 0, 0, canvas.width, canvas.height);
    picture.close();
    drawn += 1;
    canvas.dataset.frames = drawn;
    show_frame(facts);
  }
  drawing_busy = false;
}

function show_frame(facts) {
  at("number").textContent = facts.number;
  for (const [number, when] of sent_at) {
    if (number > facts.heard) continue;
    sent_at.delete(number);
    latencies.push(performance.now() - when);
    if (latencies.length > KEPT_LATENCIES) latencies.shift();
  }
  if (latencies.length) at("latency").textContent = `${median(latencies).toFixed(0)} ms`;
  if (facts.problem) say(facts.problem, true);
  const name = facts.precision;
  if (name === "fp32") {
    at("precision-line").textContent = "exact: what the others are held against";
    differences.length = 0;
  } else {
    if (facts.difference !== null) differences.push(facts.difference);
    if (differences.length > KEPT_DIFFERENCES) differences.shift();
    const now = differences.at(-1);
    const how = facts.simulated ? "simulated: this device has no such arithmetic; " : "";
    at("precision-line").textContent = how + (now === undefined ? "comparing with fp32"
      : `${now.toFixed(2)} of 255 from the fp32 frame`);
  }
  const highest = Math.max(1, ...differences);
  at("difference").firstElementChild.setAttribute("points",
    differences.map((value, k) => `${(240 * k) / (KEPT_DIFFERENCES - 1)},${38 - (36 * value) / highest}`).join(" "));
}

function median(values) {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
}

function say(text, bad) {
  at("line").textContent = text;
  at("line").classList.toggle("bad", bad);
}

function act() {
  const sum = { forward: 0, left: 0, turn: 0 };
  for (const key of held) for (const [name, value] of Object.entries(MOVES[key])) sum[name] += value;
  for (const name of Object.keys(sum)) sum[name] = Math.max(-1, Math.min(1, sum[name]));
  wish += 1;
  if (held.size) sent_at.set(wish, performance.now());
  send({ act: sum, number: wish });
  for (const button of at("keys").querySelectorAll("button")) button.classList.toggle("on", held.has(button.dataset.key));
}

function press(key, down) {
  if (!plays || !world || world.source !== "keys" || held.has(key) === down) return;
  if (down) held.add(key); else held.delete(key);
  act();
}

function key_of(event) {
  const key = event.key.toLowerCase();
  const stepping = event.target instanceof HTMLInputElement && key.startsWith("arrow"); // a number up or down
  return key in MOVES && !stepping && !event.ctrlKey && !event.metaKey && !event.altKey ? key : null;
}

addEventListener("keydown", (event) => {
  const key = key_of(event);
  if (key === null) return;
  event.preventDefault();
  if (document.activeElement instanceof HTMLInputElement) canvas.focus();
  press(key, true);
});
addEventListener("keyup", (event) => {
  const key = event.key.toLowerCase();
  if (key in MOVES) press(key, false);
});
addEventListener("blur", () => {
  if (!held.size) return;
  held.clear();
  act();
});
for (const button of at("keys").querySelectorAll("button")) {
  button.addEventListener("pointerdown", () => press(button.dataset.key, true));
  for (const name of ["pointerup", "pointerleave", "pointercancel"]) {
    button.addEventListener(name, () => press(button.dataset.key, false));
  }
}
at("precision").addEventListener("click", (event) => {
  const name = event.target.dataset.precision;
  if (!name) return;
  differences.length = 0;
  say("", false);
  at("precision-line").textContent = `changing to ${name}`;
  send({ precision: name });
  canvas.focus();
});
at("steps").addEventListener("change", () => {
  if (!at("steps").reportValidity()) return;
  say("", false);
  send({ steps: Number(at("steps").value) });
  canvas.focus();
});
at("again").addEventListener("click", () => {
  if (!at("seed").reportValidity()) return;
  say("", false);
  send({ seed: Number(at("seed").value) });
  canvas.focus();
});
at("seed").addEventListener("change", () => at("again").click());
at("record").addEventListener("click", () => {
  send({ record: !recording });
  canvas.focus();
});

at("start-camera").addEventListener("click", async () => {
  const line = at("camera-line"), video = at("video");
  if (!navigator.mediaDevices) {
    line.textContent = "this browser gives no camera to a page that is not local or https";
    return;
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 } });
  } catch (error) {
    line.classList.add("bad");
    line.textContent = { NotAllowedError: "the camera was refused; allow it for this page and try again",
      NotFoundError: "there is no camera on this machine",
      NotReadableError: "another program has the camera; close it and try again" }[error.name] || String(error);
    return;
  }
  line.classList.remove("bad");
  line.textContent = "Pictures stay on this machine.";
  video.srcObject = stream;
  video.hidden = false;
  await video.play();
  const small = document.createElement("canvas");
  [small.width, small.height] = [world.width, world.height];
  const into = small.getContext("2d");
  clearInterval(camera_timer);
  camera_timer = setInterval(() => {
    if (!plays || socket.bufferedAmount > 0) return;
    const scale = Math.max(small.width / video.videoWidth, small.height / video.videoHeight);
    const [w, h] = [video.videoWidth * scale, video.videoHeight * scale];
    into.drawImage(video, (small.width - w) / 2, (small.height - h) / 2, w, h);
    small.toBlob((jpeg) => jpeg && send(jpeg), "image/jpeg", 0.9);
  }, 40);
});

connect();
