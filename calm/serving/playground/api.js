// The server's own interface: models, and completions as server-sent events.

/** What the server answered instead of a text, as it said it. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.error = error;
  }

  /** The fields of the error beside its message, those that are set. */
  get details() {
    const { type, param, code } = this.error;
    const named = Object.entries({ type, param, code }).filter(([, value]) => value != null);
    const status = this.status === 200 ? [] : [`status ${this.status}`];
    return [...status, ...named.map(([name, value]) => `${name}: ${value}`)].join(", ");
  }
}

function headers(key) {
  const json = { "Content-Type": "application/json" };
  return key ? { ...json, Authorization: `Bearer ${key}` } : json;
}

async function request(path, key, options) {
  const response = await fetch(path, { ...options, headers: headers(key) });
  if (response.ok) return response;
  const text = await response.text();
  let error = { message: text || response.statusText };
  try {
    error = JSON.parse(text).error ?? error;
  } catch {
    // not from this server, but from something before it: its text is shown as it came
  }
  throw new ApiError(response.status, error);
}

/** The models that are served. */
export async function listModels(key) {
  return (await (await request("v1/models", key)).json()).data;
}

/** The events of a completion, one a chunk; throws `ApiError` for an error in the stream, too. */
export async function* complete(body, key, signal) {
  const options = { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await request("v1/completions", key, options);
  let rest = "";
  for await (const part of parts(response.body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + part).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(response.status, event.error);
      yield event;
    }
  }
  throw new Error("the stream ended before the text did");
}

async function* parts(stream) {
  const reader = stream.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    await reader.cancel();
  }
}
