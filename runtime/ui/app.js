// The page: wait for the model, build the form, run one request at a time, keep what it made.

import { ApiError, drawPictures, drawVideo, getJson, getKey, health, setKey } from './api.js';
import * as form from './form.js';
import { $, make } from './form.js';
import { curl, sdk } from './snippets.js';

const JOB = `diffusion-runtime job ${location.pathname}`; // a video goes on while the page is read anew
const STAGES = {
  queued: 'Waiting for its turn', in_progress: 'Starting', prepare: 'Preparing', tokens: 'Composing', denoise: 'Drawing',
  decode: 'Decoding', encode: 'Encoding', lost: 'No connection; trying again',
};
let model = ''; // its name
let media = 'image';
let running = null; // AbortController of the request under way

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// --- start

async function start() {
  for (;;) {
    try {
      await untilReady();
      model = (await getJson('v2/models')).models[0];
      $('key-form').hidden = true;
      await describe();
      break;
    } catch (error) {
      if (error.status === 401) await askForKey(error.message);
      else {
        tellState(false, error.message);
        await sleep(2000);
      }
    }
  }
  const job = sessionStorage.getItem(JOB);
  if (job && media === 'video') await generate(job);
}

// Asked each second, but once ready only where something failed: an open page must not keep a model from scaling to zero.
async function untilReady() {
  for (;;) {
    const { ready, text } = await health();
    tellState(ready, text);
    if (ready) return;
    await sleep(1000);
  }
}

function tellState(ready, text) {
  $('state').className = ready ? 'ready' : 'waiting';
  if ($('state').textContent !== text) $('state').textContent = text;
}

let built = '';

async function describe() {
  const { properties, outputs } = await getJson(`v2/models/${encodeURIComponent(model)}`);
  if (!properties) throw new ApiError(503, 'the model is not ready');
  const { parameters, pipeline, device, revision } = properties;
  media = outputs[0].name;
  // Built anew only for another schema: what has been typed stays.
  if (built !== (built = JSON.stringify(parameters))) form.build(parameters, media);
  $('name').textContent = model;
  document.title = `${model} · try the model`;
  $('about').textContent = [pipeline, device, revision && `revision ${revision.slice(0, 12)}`].filter(Boolean).join(' · ');
  $('main').hidden = false;
}

/** Resolves when a key has been given; the next call shows whether it is good. */
function askForKey(why) {
  $('key-error').textContent = getKey() ? why : '';
  $('key-form').hidden = false;
  $('key').focus();
  return new Promise((resolve) => {
    $('key-form').onsubmit = (event) => {
      event.preventDefault();
      const key = $('key').value.trim();
      if (!/^[\x21-\x7e]+$/.test(key)) {
        $('key-error').textContent = 'A key has letters, digits and signs only.';
        return;
      }
      setKey(key);
      $('key').value = '';
      resolve();
    };
  });
}

// --- one request

async function generate(job) {
  if (running) return;
  tellError(null);
  let fields = [];
  try {
    if (!job) fields = form.fields();
  } catch (error) {
    tellError(error);
    return;
  }
  const begun = performance.now();
  const files = form.files();
  const prompt = $('prompt').value.trim();
  running = new AbortController();
  let furthest = 0;
  const tell = (event) => {
    furthest = Math.max(furthest, event.progress ?? 0);
    tellProgress(event, furthest);
  };
  busy(true);
  tell({ stage: 'queued' });
  try {
    const named = [{ name: 'model', kind: 'string', value: model }, ...fields];
    const draw = media === 'video' ? drawVideo : drawPictures;
    const results = await draw(named, files, {
      signal: running.signal, tell, job, begun: (id) => sessionStorage.setItem(JOB, id),
    });
    const seconds = (performance.now() - begun) / 1000;
    for (const result of results) keep(result, job ? result.prompt ?? '' : prompt, seconds);
    say(results.length > 1 ? `${results.length} results are there.` : 'The result is there.');
  } catch (error) {
    if (error.name === 'AbortError') say('Cancelled.');
    else if (job && [404, 410].includes(error.status)) say('The video that was under way is gone.');
    else tellError(error);
    if (error.status === 401) {
      askForKey(error.message).then(() => {
        $('key-form').hidden = true;
        tellError(null);
      });
    } else if (error.status === 503 || error.status === 0) {
      untilReady().then(describe).catch(tellError); // the engine may have come back with other limits
    }
  } finally {
    sessionStorage.removeItem(JOB);
    running = null;
    busy(false);
  }
}

function busy(yes) {
  const hadFocus = document.activeElement;
  $('generate').disabled = yes;
  $('generate').textContent = yes ? 'Generating…' : 'Generate';
  $('cancel').disabled = false;
  $('progress').hidden = !yes;
  $('results').setAttribute('aria-busy', String(yes));
  if (yes) {
    if (hadFocus === $('generate')) $('cancel').focus({ preventScroll: true });
    $('progress').scrollIntoView({ block: 'nearest' });
  } else if (hadFocus === $('cancel')) $('generate').focus({ preventScroll: true });
}

let spoken = '';

function tellProgress({ status, stage = status, step, total, position, eta_seconds: eta }, fraction) {
  const name = STAGES[stage] ?? form.titled(stage);
  $('stage').textContent = name;
  $('step').textContent = total ? `${step} / ${total}` : position > 1 ? `${position - 1} ahead` : '';
  $('eta').textContent = eta == null ? '' : `${duration(eta)} left`;
  if (fraction) $('bar').value = fraction;
  else $('bar').removeAttribute('value'); // how far is not known yet
  const words = `${name}, ${Math.floor(fraction * 5) * 20} %`; // a screen reader hears each fifth and each stage
  if (words !== spoken) say((spoken = words));
}

const say = (text) => ($('live').textContent = text);

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

function tellError(error) {
  form.blame(error);
  const place = $('error');
  place.hidden = !error;
  place.replaceChildren();
  if (!error) return;
  place.append(make('p', {}, error instanceof ApiError || error.param ? error.message : `The page failed: ${error.message}`));
  if (error.id) place.append(make('p', { className: 'hint' }, 'Request id ', make('code', {}, error.id)));
  place.scrollIntoView({ block: 'nearest' });
}

// --- results

function keep(result, prompt, seconds) {
  const { seed, url, type } = result;
  const name = `${model}-${seed}.${type.split('/')[1]}`;
  const size = make('dd', {}, result.size ?? '…');
  let shown;
  if (type.startsWith('video/')) {
    shown = make('video', { src: url, controls: true, loop: true, muted: true, playsInline: true, preload: 'auto' });
    shown.setAttribute('aria-label', prompt);
    shown.addEventListener('loadedmetadata', () => (size.textContent = `${shown.videoWidth} × ${shown.videoHeight}`));
  } else {
    shown = make('img', { src: url, alt: prompt });
    shown.addEventListener('load', () => (size.textContent = `${shown.naturalWidth} × ${shown.naturalHeight}`));
  }
  const took = result.timings?.total ?? result.stage_durations?.total ?? seconds;
  const facts = make('dl', {}, ...[
    ['Seed', make('dd', {}, seed)],
    ['Size', size],
    ['Time', make('dd', {}, `${took.toFixed(1)} s`)],
  ].map(([word, value]) => make('div', {}, make('dt', {}, word), value)));
  const again = make('button', { type: 'button' }, 'Use this seed');
  again.addEventListener('click', () => form.setSeed(seed));
  const edit = make('button', { type: 'button' }, 'Edit this');
  edit.addEventListener('click', () => {
    add([new File([result.blob], name, { type })]);
    $('prompt').focus();
  });
  const download = make('a', { href: url, download: name, className: 'button' }, 'Download');
  const canEdit = type.startsWith('image/') && form.takesPictures();
  const actions = make('div', { className: 'row' }, again, canEdit ? edit : null, download);
  const caption = make('figcaption', {}, make('p', { title: prompt }, prompt), facts, actions);
  $('gallery').prepend(make('li', {}, make('figure', { className: 'card' }, shown, caption)));
  $('empty').hidden = true;
}

// --- code

const LANGUAGES = { curl, python: sdk };
let language = 'curl';

function showCode() {
  if (!$('code').open || !model) return;
  try {
    const fields = [{ name: 'model', kind: 'string', value: model }, ...form.fields()];
    $('snippet').textContent = LANGUAGES[language]({ media, fields, files: form.files() });
  } catch (error) {
    $('snippet').textContent = error.message;
  }
}

async function copy(chosen) {
  language = chosen;
  showCode();
  try {
    await navigator.clipboard.writeText($('snippet').textContent);
    $('copied').textContent = 'Copied';
  } catch {
    // Without HTTPS there is no clipboard: the text is selected.
    getSelection().selectAllChildren($('snippet'));
    $('copied').textContent = 'Selected: press Ctrl + C';
  }
}

// --- events

function add(list) {
  if (!form.takesPictures()) return;
  const told = form.addPictures(list);
  tellError(told ? Object.assign(new Error(told), { param: 'image' }) : null);
}

$('form').addEventListener('submit', (event) => {
  event.preventDefault();
  generate();
});
$('form').addEventListener('input', () => {
  $('copied').textContent = '';
  showCode();
});
$('form').addEventListener('reset', () => {
  form.clearPictures();
  tellError(null);
  setTimeout(showCode);
});
$('cancel').addEventListener('click', () => {
  $('cancel').disabled = true;
  running?.abort();
});
$('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) $('form').requestSubmit();
});
$('file').addEventListener('change', () => {
  add([...$('file').files]);
  $('file').value = '';
});
$('code').addEventListener('toggle', showCode);
for (const button of document.querySelectorAll('[data-copy]')) {
  button.addEventListener('click', () => copy(button.dataset.copy));
}

for (const kind of ['dragenter', 'dragover', 'dragleave', 'drop']) {
  addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes('Files')) return;
    event.preventDefault(); // or the file would be opened in the page's place
    $('drop').classList.toggle('over', kind === 'dragenter' || kind === 'dragover');
    if (kind === 'drop') add([...event.dataTransfer.files]);
  });
}
addEventListener('paste', (event) => {
  const pasted = [...(event.clipboardData?.files ?? [])];
  if (!pasted.length) return;
  event.preventDefault();
  add(pasted);
});
addEventListener('beforeunload', (event) => {
  if (running && media === 'image') event.preventDefault(); // leaving stops a picture; a video goes on
});

start();
