// The request in the form as a command and as a program. Neither holds the key.

import { getKey, jsonBody, literal, url } from './api.js';

const NATIVE = { image: ['prompt', 'model', 'n', 'size', 'output_format'], video: ['prompt', 'model', 'size', 'seconds'] };
const SAVE = `python3 -c 'import base64, json, sys
for i, item in enumerate(json.load(sys.stdin)["data"]): open(f"picture-{i}.FORMAT", "wb").write(base64.b64decode(item["b64_json"]))'`;

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const format = (fields) => fields.find((f) => f.name === 'output_format')?.value ?? 'png';

export function curl({ media, fields, files }) {
  const key = getKey() ? [`-H "X-API-Key: $API_KEY"`] : [];
  const path = media === 'video' ? 'v1/videos/sync' : files.length ? 'v1/images/edits' : 'v1/images/generations';
  const name = media === 'video' ? 'input_reference' : 'image[]';
  // --form-string: -F reads a value that begins with @ or < as a file's name.
  const given = files.length
    ? [
        ...fields.map((f) => `--form-string ${shell(`${f.name}=${f.kind === 'string' ? f.value : literal(f)}`)}`),
        ...files.map((file) => `-F ${shell(`${name}=@"${file.name.replace(/["\\]/g, '\\$&')}"`)}`),
      ]
    : [`-H 'Content-Type: application/json'`, `-d ${shell(jsonBody(fields))}`];
  const lines = [`curl -sS --fail-with-body ${shell(url(path))}`, ...key, ...given];
  if (media === 'video') return [...lines, '-o video.mp4'].join(' \\\n  ');
  return `${lines.join(' \\\n  ')} \\\n  | ${SAVE.replace('FORMAT', format(fields))}`;
}

const python = (f) => (f.kind === 'boolean' ? (f.value ? 'True' : 'False') : literal(f));

/** A program for the OpenAI SDK; what it has no argument for goes into extra_body. */
export function sdk({ media, fields, files }) {
  let given = fields;
  const size = ['width', 'height'].map((name) => fields.find((field) => field.name === name));
  if (size[0] && size[1]) {
    given = fields.filter((field) => !size.includes(field));
    given.push({ name: 'size', kind: 'string', value: size.map(literal).join('x') });
  }
  const own = (field) => NATIVE[media].includes(field.name);
  // The SDK's `seconds` is a string.
  const lines = given.filter(own).map((f) => `    ${f.name}=${f.name === 'seconds' ? `"${literal(f)}"` : python(f)},`);
  const open = files.map((file) => `open(${JSON.stringify(file.name)}, "rb")`);
  if (open.length) lines.push(media === 'video' ? `    input_reference=${open[0]},` : `    image=[${open.join(', ')}],`);
  const extra = given.filter((field) => !own(field)).map((f) => `${JSON.stringify(f.name)}: ${python(f)}`);
  if (extra.length) lines.push(`    extra_body={${extra.join(', ')}},`);
  const verb = media === 'video' ? 'videos.create_and_poll' : files.length ? 'images.edit' : 'images.generate';
  const key = getKey() ? 'os.environ["API_KEY"]' : '"none"';
  const save =
    media === 'video'
      ? ['assert result.status == "completed", result.error', 'client.videos.download_content(result.id).write_to_file("video.mp4")']
      : [
          'for i, picture in enumerate(result.data):',
          `    with open(f"picture-{i}.${format(fields)}", "wb") as file:`,
          '        file.write(base64.b64decode(picture.b64_json))',
        ];
  return [
    ...(media === 'video' ? [] : ['import base64']),
    ...(getKey() ? ['import os'] : []),
    ...(media === 'video' && !getKey() ? [] : ['']),
    'from openai import OpenAI',
    '',
    `client = OpenAI(base_url=${JSON.stringify(url('v1'))}, api_key=${key})`,
    `result = client.${verb}(`,
    ...lines,
    ')',
    ...save,
    '',
  ].join('\n');
}
