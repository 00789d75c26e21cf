// The playground: a conversation, its sampling controls, and how fast each answer came.

import { stream } from "./api.js";

const by = (id) => document.getElementById(id);
const log = by("log");
const messages = [];
let running = null; // the AbortController of the answer under way

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

// The fields of a request as the controls stand; an empty control is left out.
function sampling() {
  const fields = {};
  for (const name of NUMBERS) if (by(name).value !== "") fields[name] = Number(by(name).value);
  if (by("stop_text").value) fields.stop = [by("stop_text").value];
  return fields;
}

function requestOf(text) {
  const common = { ...sampling(), stream: true, stream_options: { include_usage: true } };
  if (by("form").value === "completion") return ["v1/completions", { ...common, prompt: text }];
  const system = by("system").value.trim();
  const opening = system ? [{ role: "system", content: system }] : [];
  return ["v1/chat/completions", { ...common, messages: [...opening, ...messages, { role: "user", content: text }] }];
}

// One entry of the conversation; text is set as text, never as HTML.
function say(who, text, kind = who) {
  by("hint")?.remove();
  const entry = document.createElement("article");
  entry.className = `said ${kind}`;
  const parts = {};
  for (const name of ["who", "text", "counts"]) {
    parts[name] = document.createElement("div");
    parts[name].className = name;
    entry.append(parts[name]);
  }
  parts.who.textContent = who;
  parts.text.textContent = text;
  log.append(entry);
  log.scrollTop = log.scrollHeight;
  return parts;
}

const seconds = (ms) => `${(ms / 1000).toFixed(2)} s`;

async function ask(text) {
  const [path, body] = requestOf(text);
  say("you", text, "user");
  const entry = say("model", "", "model");
  const begun = performance.now();
  let answer = "", first = 0, last = 0, pieces = 0, usage = null, reason = null;
  const rate = () => {
    const tokens = usage ? usage.completion_tokens : pieces;
    return tokens > 1 && last > first ? ((tokens - 1) * 1000) / (last - first) : 0;
  };
  running = new AbortController();
  setBusy(true);
  try {
    for await (const event of stream(path, body, running.signal)) {
      usage = event.usage || usage;
      const choice = event.choices[0];
      if (!choice) continue;
      const piece = choice.delta ? choice.delta.content : choice.text;
      reason = choice.finish_reason || reason;
      if (!piece) continue;
      last = performance.now();
      first = first || last;
      pieces += 1;
      answer += piece;
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      entry.text.textContent = answer;
      if (atEnd) log.scrollTop = log.scrollHeight;
      by("speed").textContent = rate() ? `${rate().toFixed(1)} tokens/s` : "";
    }
  } catch (error) {
    if (error.name !== "AbortError") say("error", error.message, "error");
    reason = error.name === "AbortError" ? "stopped" : "error";
  } finally {
    running = null;
    setBusy(false);
  }
  const counts = [`${usage ? usage.completion_tokens : pieces} tokens`];
  if (first) counts.push(`first after ${seconds(first - begun)}`);
  if (rate()) counts.push(`${rate().toFixed(1)} tokens/s`);
  if (reason) counts.push(reason);
  entry.counts.textContent = counts.join(" · ");
  log.scrollTop = log.scrollHeight;
  by("speed").textContent = rate() ? `${rate().toFixed(1)} tokens/s` : "";
  if (answer) messages.push({ role: "user", content: text }, { role: "assistant", content: answer });
}

function setBusy(busy) {
  by("send").disabled = busy;
  by("stop").disabled = !busy;
  log.setAttribute("aria-busy", String(busy));
}

export function startChat() {
  by("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = by("prompt").value;
    if (running || !text.trim()) return;
    by("prompt").value = "";
    ask(text);
  });
  by("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    by("ask").requestSubmit();
  });
  by("stop").addEventListener("click", () => running?.abort());
  by("clear").addEventListener("click", () => {
    running?.abort();
    messages.length = 0;
    log.replaceChildren();
    by("speed").textContent = "";
  });
}
