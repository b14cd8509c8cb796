// The server as the page sees it. URLs are relative to this file, so that any prefix in front of /ui works.

const BASE = new URL('../', import.meta.url);
const KEY = `diffusion-runtime key ${BASE.pathname}`; // the origin may serve other pages beside this one
const STATUS_MS = 1000;
const CUT = 'The connection ended before the result was there.';

export const url = (path) => new URL(path, BASE).href;
export const getKey = () => sessionStorage.getItem(KEY) ?? '';
export const setKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

export class ApiError extends Error {
  constructor(status, message, { param = null, id = null } = {}) {
    super(message);
    Object.assign(this, { status, param, id });
  }
}

/** The response, or an ApiError with the server's own message. The key goes as X-API-Key: a proxy in front may use
 *  Authorization for itself. */
export async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  if (getKey()) headers.set('X-API-Key', getKey());
  let response;
  try {
    response = await fetch(url(path), { cache: 'no-store', ...options, headers });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(0, 'The server cannot be reached.');
  }
  if (!response.ok) throw refusal(response.status, await response.text(), response);
  return response;
}

function refusal(status, text, response) {
  const id = response?.headers.get('x-request-id') ?? null;
  try {
    const { error } = JSON.parse(text);
    if (typeof error === 'string') return new ApiError(status, error, { id });
    return new ApiError(status, error.message, { param: error.param, id });
  } catch {
    return new ApiError(status, `The server, or a proxy before it, answered ${status} ${response?.statusText ?? ''}`, { id });
  }
}

/** JSON whose seeds stay exact: they go beyond what a double holds. */
const parse = (text) => JSON.parse(text, (name, value, context) => (name === 'seed' ? context?.source ?? value : value));

export const getJson = async (path, options) => parse(await (await call(path, options)).text());

/** The server's state: `ready`, and `text` in its own words. No key is needed. */
export async function health() {
  try {
    await call('v2/health/ready');
    return { ready: true, text: 'ready' };
  } catch (error) {
    return { ready: false, text: error.message };
  }
}

// --- requests

const integer = /^[+-]?\d+$/;

/** A value as JSON text; integers as they were typed, for the same reason. */
export function literal({ kind, value }) {
  if (kind === 'boolean') return String(value);
  if (kind === 'string') return JSON.stringify(value);
  return integer.test(value) ? String(BigInt(value)) : String(Number(value));
}

export const jsonBody = (fields) => `{${fields.map((f) => `${JSON.stringify(f.name)}: ${literal(f)}`).join(', ')}}`;

function body(fields, files, fileField) {
  if (!files.length) return { body: jsonBody(fields), headers: { 'Content-Type': 'application/json' } };
  const form = new FormData();
  for (const field of fields) form.append(field.name, field.kind === 'string' ? field.value : literal(field));
  for (const file of files) form.append(fileField, file, file.name);
  return { body: form };
}

/** Pictures: one request whose events tell how far it is. Ending the connection stops the device. */
export async function drawPictures(fields, files, { signal, tell }) {
  const path = files.length ? 'v1/images/edits' : 'v1/images/generations';
  const streamed = [...fields, { name: 'stream', kind: 'boolean', value: true }];
  const response = await call(path, { method: 'POST', signal, ...body(streamed, files, 'image[]') });
  const made = [];
  try {
    for await (const event of events(response)) {
      if (event.error) throw failure(event.error, response);
      if (event.type?.endsWith('.completed')) made.push(picture(event));
      else if (event.type?.endsWith('.progress')) tell(event);
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === 'AbortError') throw error;
    throw failure({ message: CUT }, response);
  }
  if (!made.length) throw failure({ message: CUT }, response);
  return made;
}

const failure = (error, response) =>
  new ApiError(200, error.message ?? String(error), { param: error.param, id: response.headers.get('x-request-id') });

function picture(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (c) => c.charCodeAt(0));
  const type = `image/${event.output_format ?? 'png'}`;
  const blob = new Blob([bytes], { type });
  return { ...event, b64_json: undefined, type, blob, url: URL.createObjectURL(blob) };
}

/** Server-sent events as objects. Lines are put together from parts once: a picture's is many megabytes long. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [];
  let data = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const pieces = value.split('\n');
    const tail = pieces.pop();
    for (const piece of pieces) {
      const line = [...parts, piece].join('').replace(/\r$/, '');
      parts = [];
      if (line.startsWith('data:')) data.push(line.slice(5).trimStart());
      else if (!line && data.length) {
        const text = data.join('\n');
        data = [];
        if (text !== '[DONE]') yield parse(text);
      }
    }
    parts.push(tail);
  }
}

/** A video: a job that is asked about each second. `job` is the id of one that runs already. */
export async function drawVideo(fields, files, { signal, tell, job, begun }) {
  let told = job
    ? await getJson(`v1/videos/${job}`)
    : await getJson('v1/videos', { method: 'POST', ...body(fields, files, 'input_reference') });
  begun(told.id);
  const path = `v1/videos/${encodeURIComponent(told.id)}`;
  let failures = 0;
  while (told.status === 'queued' || told.status === 'in_progress') {
    tell({ ...told, progress: told.progress / 100 });
    await pause(STATUS_MS, signal);
    if (signal.aborted) {
      await call(path, { method: 'DELETE' });
      throw new DOMException('cancelled', 'AbortError');
    }
    try {
      told = await getJson(path);
      failures = 0;
    } catch (error) {
      // The job outlives a connection, and a server too.
      if (![0, 502, 503, 504].includes(error.status) || (failures += 1) > 60) throw error;
      tell({ stage: 'lost' });
    }
  }
  if (told.status !== 'completed') throw new ApiError(200, told.error?.message ?? `the video is ${told.status}`, { id: told.id });
  // A video element can't send a key: with one the whole file is fetched.
  const content = `${path}/content`;
  const address = getKey() ? URL.createObjectURL(await (await call(content)).blob()) : url(content);
  return [{ ...told, type: 'video/mp4', url: address }];
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    setTimeout(resolve, signal.aborted ? 0 : ms);
    signal.addEventListener('abort', resolve, { once: true });
  });
}
