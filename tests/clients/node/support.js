// What the clients are told of the service, and how plain HTTP is answered.
import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { z } from 'zod';

export const baseURL = `${process.env.SERVICE_URL}/v1`;
export const picture = await readFile(process.env.PICTURE);

const image = { type: 'image_url', image_url: { url: `data:image/png;base64,${picture.toString('base64')}` } };

// Model and messages, with and without an image.
export const questions = {
  text: { model: 'poet', messages: [{ role: 'user', content: 'hello' }] },
  image: { model: 'sight', messages: [{ role: 'user', content: [{ type: 'text', text: 'hello' }, image] }] },
};

export const greedy = { temperature: 0, max_tokens: 12 };

// What the model is asked to write: little enough for random weights to end it, whatever they choose.
export const Weather = z.strictObject({ city: z.enum(['Paris', 'Oslo']), days: z.int().min(1).max(7) });
export const room = { temperature: 0, max_tokens: 100 };

export const isWeather = (value) => assert.deepEqual(Weather.parse(value), value);

export async function byHand(question) {
  const response = await fetch(`${baseURL}/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ ...question, ...greedy }),
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error.message);
  return answer.choices[0].message.content;
}
