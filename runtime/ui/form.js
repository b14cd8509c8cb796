// Controls for what the model's own parameter schema says: v2 metadata's `properties.parameters`.

// Where the parameter's own name, with spaces, does not tell enough.
const LABELS = {
  num_inference_steps: 'Steps', guidance_scale: 'Guidance', guidance_scale_2: 'Guidance, low noise', num_frames: 'Frames',
  fps: 'Frames a second', n: 'How many', output_format: 'Format', output_quality: 'Quality',
  timeout: 'Timeout, seconds', max_sequence_length: 'Prompt tokens',
};
const FIRST = ['negative_prompt', 'width', 'height', 'num_frames', 'seconds', 'num_inference_steps', 'guidance_scale', 'seed', 'n'];
const ELSEWHERE = ['prompt', 'image', 'dry_run']; // a dry run draws nothing: of no use on this page
const RIVALS = { seconds: 'num_frames', num_frames: 'seconds' };

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; what is null is left out. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

let parameters = {};
const inputs = new Map(); // parameter's name -> its control

export function build(schema, media) {
  parameters = schema;
  inputs.clear();
  inputs.set('prompt', $('prompt'));
  $('prompt-hint').textContent = `${schema.prompt?.description ?? ''} Ctrl + Enter generates.`.trim();
  const names = Object.keys(schema).filter((name) => !ELSEWHERE.includes(name) && !(name === 'n' && media === 'video'));
  const rank = (name) => (FIRST.indexOf(name) + 1 || 99);
  const first = names.filter((name) => FIRST.includes(name)).sort((a, b) => rank(a) - rank(b));
  $('controls').replaceChildren(...first.map(control));
  const rest = names.filter((name) => !FIRST.includes(name)).map(control);
  $('rest').replaceChildren(...rest);
  $('more').hidden = !rest.length;
  const image = schema.image;
  $('pictures').hidden = !image;
  $('file').multiple = (image?.max_items ?? 1) > 1;
  $('file-hint').textContent = image
    ? `${image.description} ${image.required ? 'Needed' : 'Optional'}; at most ${image.max_items ?? 1}.`
    : '';
}

export const titled = (name) => {
  const words = name.replaceAll('_', ' ');
  return LABELS[name] ?? words[0].toUpperCase() + words.slice(1);
};

function control(name) {
  const p = parameters[name];
  const id = `p-${name}`;
  const common = { id, name };
  const wide = p.type === 'string' && !p.choices;
  let input;
  if (p.choices) {
    const options = p.choices.map((value) => make('option', { value, selected: value === p.default }, value));
    if (p.default === undefined) options.unshift(make('option', { value: '' }, 'automatic'));
    input = make('select', common, ...options);
  } else if (p.type === 'boolean') {
    input = make('input', { ...common, type: 'checkbox', defaultChecked: p.default === true });
  } else if (wide) {
    input = make('textarea', { ...common, rows: 2, placeholder: p.default ?? '' });
  } else if (name === 'seed') {
    // Seeds go beyond what a number field, a double, holds.
    input = make('input', { ...common, type: 'text', inputMode: 'numeric', placeholder: 'random', autocomplete: 'off' });
  } else {
    const step = p.multiple_of ?? (p.type === 'integer' ? 1 : 0.1);
    const base = p.multiple_of ? Math.ceil(((p.minimum ?? 0) - p.offset) / step) * step + p.offset : p.minimum;
    input = make('input', { ...common, type: 'number', step, placeholder: p.default ?? 'automatic' });
    if (base !== undefined) input.min = base; // browsers count steps from here
    if (p.maximum !== undefined) input.max = p.maximum;
  }
  const hint = make('p', { id: `${id}-hint`, className: 'hint' }, describe(name, p));
  input.setAttribute('aria-describedby', hint.id);
  if (RIVALS[name]) input.addEventListener('input', () => input.value && inputs.get(RIVALS[name]) && (inputs.get(RIVALS[name]).value = ''));
  inputs.set(name, input);
  const label = make('label', { htmlFor: id }, titled(name));
  return make('div', { className: wide ? 'field wide' : p.type === 'boolean' ? 'field check' : 'field' }, label, input, hint);
}

function describe(name, p) {
  if (name === 'seed' || !['integer', 'number'].includes(p.type)) return p.description;
  const fits = p.fits.replace(/^an? (finite )?\w+ ?/, '').replace(' that is', ',');
  return fits ? `${p.description} ${fits[0].toUpperCase()}${fits.slice(1)}.` : p.description;
}

/** What the form says beside its defaults: {name, kind, value}, numbers as they were typed. Throws {param, message}
 *  for what the browser does not read as a number at all; everything else is the server's to judge. */
export function fields() {
  const found = [];
  for (const [name, input] of inputs) {
    const p = parameters[name] ?? { type: 'string' };
    if (p.type === 'boolean') {
      if (input.checked !== (p.default === true)) found.push({ name, kind: 'boolean', value: input.checked });
      continue;
    }
    const value = p.type === 'string' ? input.value : input.value.trim();
    if (input.validity.badInput || (name === 'seed' && value && !/^[+-]?\d+$/.test(value))) {
      throw Object.assign(new Error(`${titled(name)}: this is not a number`), { param: name });
    }
    if (value === '' || (p.choices && value === p.default)) continue;
    found.push({ name, kind: p.type, value });
  }
  if (parameters.image?.required && !pictures.length) {
    throw Object.assign(new Error('This model needs a source picture.'), { param: 'image' });
  }
  return found;
}

/** Mark the control that an error is about, by the server's `param` or by the field that its message begins with. */
export function blame(error) {
  const name = error?.param ?? /^(?:\w+\[\d+\]: )?(\w+)(?: x \w+)?\b/.exec(error?.message ?? '')?.[1];
  for (const [other, input] of [...inputs, ['image', $('file')]]) {
    if (error && other === name) {
      input.setAttribute('aria-invalid', 'true');
      const hidden = input.closest('details');
      if (hidden) hidden.open = true;
    } else input.removeAttribute('aria-invalid');
  }
}

export function setSeed(seed) {
  const input = inputs.get('seed');
  input.value = seed;
  input.focus();
  input.dispatchEvent(new Event('input', { bubbles: true }));
}

// --- source pictures

const TYPES = ['image/png', 'image/jpeg', 'image/webp', 'image/gif'];
let pictures = []; // {file, url}

export const files = () => pictures.map((picture) => picture.file);
export const takesPictures = () => Boolean(parameters.image);

/** Add files; what no picture is, or no place is left for, is told. One place: the new picture takes the old one's. */
export function addPictures(list) {
  const most = parameters.image.max_items ?? 1;
  const fit = [...list].filter((file) => TYPES.includes(file.type));
  const told = fit.length < list.length ? 'Only PNG, JPEG, WebP and GIF pictures fit.' : '';
  if (most === 1 && fit.length) clearPictures();
  const room = fit.slice(0, most - pictures.length);
  pictures.push(...room.map((file) => ({ file, url: URL.createObjectURL(file) })));
  show();
  return room.length < fit.length ? `At most ${most} source pictures fit.` : told;
}

export function clearPictures() {
  for (const { url } of pictures) URL.revokeObjectURL(url);
  pictures = [];
  show();
}

function show() {
  $('thumbs').replaceChildren(
    ...pictures.map((picture, i) => {
      const name = picture.file.name;
      const remove = make('button', { type: 'button', className: 'remove', title: 'Remove' }, '×');
      remove.setAttribute('aria-label', `Remove ${name}`);
      remove.addEventListener('click', () => {
        URL.revokeObjectURL(picture.url);
        pictures.splice(i, 1);
        show();
        ($('thumbs').querySelectorAll('.remove')[Math.min(i, pictures.length - 1)] ?? $('file')).focus();
      });
      return make('li', {}, make('img', { src: picture.url, alt: name, title: name }), remove);
    }),
  );
  $('form').dispatchEvent(new Event('input'));
}
