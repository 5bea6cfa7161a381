// The Vercel AI SDK against the service, through its provider for servers like OpenAI's.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, generateText, streamText } from 'ai';
import { baseURL, byHand, greedy, picture, questions } from './support.js';

const provider = createOpenAICompatible({
  name: 'llama-adapter',
  baseURL,
  apiKey: 'none',
  includeUsage: true,
  supportsStructuredOutputs: true,
});

// The same questions in the SDK's own form.
const text = { type: 'text', text: 'hello' };
const asked = {
  text: { model: provider('poet'), messages: [{ role: 'user', content: 'hello' }] },
  image: {
    model: provider('sight'),
    messages: [{ role: 'user', content: [text, { type: 'file', mediaType: 'image/png', data: picture }] }],
  },
};
const settings = { temperature: greedy.temperature, maxOutputTokens: greedy.max_tokens, maxRetries: 0 };

for (const [kind, question] of Object.entries(asked)) {
  test(`generateText, ${kind}`, async () => {
    const answer = await generateText({ ...question, ...settings });
    assert.equal(answer.text, await byHand(questions[kind]));
    assert.ok(['stop', 'length'].includes(answer.finishReason));
    assert.equal(answer.usage.totalTokens, answer.usage.inputTokens + answer.usage.outputTokens);
    assert.equal(answer.response.modelId, questions[kind].model);
    assert.deepEqual(answer.toolCalls, []);
  });

  test(`streamText, ${kind}`, async () => {
    const stream = streamText({ ...question, ...settings, onError: ({ error }) => { throw error; } });
    const pieces = await Array.fromAsync(stream.textStream);
    assert.equal(pieces.join(''), await byHand(questions[kind]));
    assert.ok(['stop', 'length'].includes(await stream.finishReason));
    assert.ok((await stream.usage).outputTokens > 0);
  });
}

test('mistakes are errors that are not tried again', async () => {
  const unknown = generateText({ ...asked.text, model: provider('nobody'), maxRetries: 0 });
  await assert.rejects(unknown, (error) => {
    assert.ok(APICallError.isInstance(error));
    assert.equal(error.statusCode, 404);
    assert.equal(error.isRetryable, false);
    assert.match(error.message, /nobody/);
    return true;
  });
});
