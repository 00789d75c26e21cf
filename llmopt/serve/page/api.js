// Requests to the server this page came from: JSON, text, and streams of server-sent events.

const HERE = new URL(".", document.baseURI);
let key = sessionStorage.getItem("llmopt-key") || "";
let whenRefused = () => {};

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Calls `ask` whenever the server refuses for want of a key.
export function onRefused(ask) {
  whenRefused = ask;
}

// Kept for this tab only.
export function useKey(value) {
  key = value;
  sessionStorage.setItem("llmopt-key", value);
}

async function request(path, options = {}) {
  const headers = { ...(key ? { authorization: `Bearer ${key}` } : {}), ...options.headers };
  const response = await fetch(new URL(path, HERE), { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  if (response.status === 401) whenRefused();
  const text = await response.text();
  throw new ApiError(response.status, message(text) || `the server answered ${response.status}`);
}

function message(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 200);
  }
}

export async function getJson(path) {
  return (await request(path)).json();
}

export async function getText(path) {
  return (await request(path)).text();
}

// The events of a streamed answer; one that holds an error is thrown. Ends with [DONE].
export async function* stream(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const response = await request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "the connection ended before the answer did");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(0, event.error.message);
      yield event;
    }
  }
}
