mod args;
mod chat;
mod output;

pub use args::GenerateArgs;

use crate::accelerator;
use crate::base::Base;
use anyhow::Context;
use args::Work;
use chat::Conversation;
use offshoot_client::{Client, ClientOptions};
use offshoot_model::ModelConfig;
use offshoot_model::weights::Checkpoint;
use offshoot_trainer::adapter::{Adapter, Visit, VisitOptions};
use offshoot_trainer::fit;
use offshoot_trainer::generate::{Decoder, GenerateOptions, Request, WholeModel, end_ids};
use offshoot_trainer::tokenizer::Tokenizer;
use output::Printer;
use std::process::ExitCode;
use std::time::Duration;
use tch::{Device, Kind};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A server that does not answer keeps nobody from leaving for longer.
const PATIENCE_AT_THE_END: Duration = Duration::from_secs(5);
/// The exit status of what Ctrl-C has ended.
const INTERRUPTED: u8 = 130;

/// Runs the subcommand. Exit status 130 if it was stopped by Ctrl-C.
pub fn run(args: GenerateArgs) -> anyhow::Result<ExitCode> {
    let device = accelerator::device(&args.model.device)?;
    let options = args.sampling.options(args.text.chat)?;
    let work = args.text.work()?;
    // The model computes on this thread; the connection lives on the runtime's.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let finished = runtime.block_on(generate(&args, options, work, device));
    // A thread may still wait for a line of standard input.
    runtime.shutdown_background();
    Ok(if finished? { ExitCode::SUCCESS } else { ExitCode::from(INTERRUPTED) })
}

/// What all ways need.
struct Loaded {
    checkpoint: Checkpoint,
    config: ModelConfig,
    adapter: Option<Adapter>,
    tokenizer: Tokenizer,
    end_ids: Vec<u32>,
}

impl Loaded {
    fn load(args: &GenerateArgs) -> anyhow::Result<Self> {
        let path = args.model.adapter.as_deref();
        let base = Base::find(args.model.model_name.clone(), path, args.model.step)?;
        let Base { name, checkpoint, config, adapter } = base;
        if let Some(wanted) = &args.model.model_type {
            fit::model_type(&name, &config, Some(wanted))?;
        }
        let mut tokenizer = Tokenizer::load(&checkpoint)?;
        if let Some(template) = &args.text.chat_template {
            tokenizer = tokenizer.with_chat_template(template)?;
        }
        let end_ids = end_ids(&checkpoint, Some(&tokenizer))?;
        Ok(Loaded { checkpoint, config, adapter, tokenizer, end_ids })
    }
}

/// False if it was interrupted.
async fn generate(
    args: &GenerateArgs,
    options: GenerateOptions,
    work: Work,
    device: Device,
) -> anyhow::Result<bool> {
    let privacy = args.privacy.into_options(args.server.address().as_deref())?;
    let loaded = Loaded::load(args)?;
    // Before a long loading: this model may have no chat template.
    if args.text.chat {
        let mut conversation = Conversation::new(args.text.system.as_deref());
        conversation.say("user", "Hello");
        loaded.tokenizer.encode_conversation(conversation.messages())?;
    }
    let kind = Kind::from(args.model.dtype);
    match args.server.address() {
        None => {
            let Loaded { checkpoint, config, adapter, .. } = &loaded;
            let model = WholeModel::load(checkpoint, config, adapter.as_ref(), (kind, device))?;
            let mut speaker = Speaker::new(args, &loaded, options, Decoder::whole(&model))?;
            speaker.run(args, work).await
        }
        Some(address) => {
            let way = args.server.connection.options(ClientOptions::default())?;
            let client = Client::connect_with(&address, way).await?;
            let server = client.describe().await?;
            let wanted = [args.model.split_point_1, args.model.split_point_2];
            fit::split_points(&address, &server, wanted)?;
            let mut visit = Visit::begin(VisitOptions {
                client: &client,
                checkpoint: &loaded.checkpoint,
                config: &loaded.config,
                adapter: loaded.adapter.as_ref(),
                name: "generate",
                wire_dtype: args.server.wire_dtype.into(),
                kind,
                device,
            })
            .await?;
            visit.model.perturb(&privacy)?;
            let decoder = Decoder::visiting(&visit.model, &mut visit.session, &client);
            let result = match Speaker::new(args, &loaded, options, decoder) {
                Ok(mut speaker) => speaker.run(args, work).await,
                Err(error) => Err(error),
            };
            leave(visit).await;
            result
        }
    }
}

/// The session is forgotten, whatever came before.
async fn leave(visit: Visit) {
    match tokio::time::timeout(PATIENCE_AT_THE_END, visit.end(Ok(()))).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!("the session on the server was not deleted: {error}"),
        Err(_) => tracing::warn!(
            "the session on the server was not deleted: no answer in {} s",
            PATIENCE_AT_THE_END.as_secs()
        ),
    }
}

/// Ctrl-C, and what else ends programs politely.
struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen to signals");
        Ok(Interrupts {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// A model that says something, and where it says it.
struct Speaker<'a> {
    decoder: Decoder<'a>,
    tokenizer: &'a Tokenizer,
    end_ids: &'a [u32],
    options: GenerateOptions,
    printer: Printer,
    compare_no_cache: bool,
    with_summary: bool,
    interrupts: Interrupts,
}

/// How a text came to its end.
enum Spoken {
    Whole(String),
    /// By Ctrl-C.
    BrokenOff(String),
}

impl<'a> Speaker<'a> {
    fn new(
        args: &GenerateArgs,
        loaded: &'a Loaded,
        options: GenerateOptions,
        decoder: Decoder<'a>,
    ) -> anyhow::Result<Self> {
        Ok(Speaker {
            decoder,
            tokenizer: &loaded.tokenizer,
            end_ids: &loaded.end_ids,
            options,
            printer: Printer::new(&args.output, !args.text.chat),
            compare_no_cache: args.output.compare_no_cache,
            with_summary: true,
            interrupts: Interrupts::listen()?,
        })
    }

    /// False if it was interrupted.
    async fn run(&mut self, args: &GenerateArgs, work: Work) -> anyhow::Result<bool> {
        let system = args.text.system.as_deref();
        let finished = match work {
            Work::Conversation => {
                self.with_summary = false;
                chat::converse(self, system).await?
            }
            Work::Prompts(prompts) => {
                let chat = args.text.chat.then_some(system);
                self.answer_all(&prompts, chat).await?
            }
        };
        self.printer.finish().context("standard output")?;
        Ok(finished)
    }

    /// `chat`: through the chat template, with what the system says first.
    async fn answer_all(
        &mut self,
        prompts: &[String],
        chat: Option<Option<&str>>,
    ) -> anyhow::Result<bool> {
        for prompt in prompts {
            let ids = match chat {
                None => self.tokenizer.encode(prompt)?,
                Some(system) => {
                    let mut conversation = Conversation::new(system);
                    conversation.say("user", prompt);
                    self.tokenizer.encode_conversation(conversation.messages())?
                }
            };
            if let Spoken::BrokenOff(_) = self.speak(prompt, &ids).await? {
                return Ok(false);
            }
            if self.printer.is_closed() {
                break;
            }
        }
        Ok(true)
    }

    /// One text, printed while it comes.
    async fn speak(&mut self, prompt: &str, ids: &[u32]) -> anyhow::Result<Spoken> {
        let request = Request {
            prompt: ids,
            options: &self.options,
            end_ids: self.end_ids,
            tokenizer: Some(self.tokenizer),
        };
        self.printer.begin(prompt);
        let mut said = String::new();
        let printer = &mut self.printer;
        let mut each = |piece: &str| {
            said += piece;
            printer.piece(piece);
        };
        self.decoder.remember(true);
        let done = tokio::select! {
            done = self.decoder.generate(&request, &mut each) => done?,
            () = self.interrupts.wait() => {
                printer.broken_off();
                return Ok(Spoken::BrokenOff(said));
            }
        };
        let mut without = None;
        if self.compare_no_cache {
            self.decoder.remember(false);
            let mut unheard = |_: &str| {};
            without = tokio::select! {
                done = self.decoder.generate(&request, &mut unheard) => Some(done?),
                () = self.interrupts.wait() => return Ok(Spoken::BrokenOff(said)),
            };
        }
        self.printer.end(prompt, &done, &self.options, without.as_ref());
        if self.with_summary && without.is_none() {
            let greedy = self.options.sampling.temperature == 0.0;
            self.printer.summary(&done, (!greedy).then_some(self.options.sampling.seed));
        }
        if let Some(without) = without {
            self.printer.comparison(&done, &without);
        }
        Ok(Spoken::Whole(done.text))
    }
}
