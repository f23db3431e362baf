//! One run: a server, a trainer, the proxy between them, and where they leave their files.

use crate::program::{Log, PATIENCE, Process, Seen, Server, train};
use crate::setting::{Setting, Texts};
use anyhow::{Context, ensure};
use offshoot_tests::proxy::Proxy;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// What all runs have in common.
pub struct Common {
    pub program: PathBuf,
    pub texts: Texts,
    pub n_steps: u64,
    pub runtime: Runtime,
    /// Bytes of a server's memory that hold one adapter of [`CROWD_RANK`] and not two.
    pub budget: Option<u64>,
}

/// Of the adapters that do not fit side by side.
pub const CROWD_RANK: u32 = 256;

/// How the trainer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trainer {
    Runs,
    Done,
    /// It was killed, or gave up.
    Ended,
}

pub struct World<'a> {
    pub common: &'a Common,
    pub setting: &'a Setting,
    pub dir: PathBuf,
    pub proxy: Proxy,
    /// None: between a death and a birth.
    pub server: Option<Server>,
    pub trainer: Option<Process>,
    pub log: Log,
    pub seen: Arc<Seen>,
    /// Trainers that ended with an error of their own.
    pub n_gave_up: u64,
    killed: bool,
}

impl<'a> World<'a> {
    /// Both run.
    pub fn begin(
        common: &'a Common,
        setting: &'a Setting,
        dir: &Path,
    ) -> anyhow::Result<World<'a>> {
        fs::create_dir_all(dir).context("cannot make the run's folder")?;
        let mut config = String::from(setting.server);
        config += "\n[limits]\nmax_tokens_per_batch = 1\n";
        if let Some(budget) = common.budget.filter(|_| setting.crowded) {
            config += &format!("memory_bytes = {budget}\nmax_tokens_per_microbatch = 128\n");
        }
        fs::write(dir.join("server.toml"), config)?;
        let log = Log::open(&dir.join("log.txt"))?;
        let nowhere = ([127, 0, 0, 1], 9).into();
        let proxy = common.runtime.block_on(Proxy::start(nowhere))?;
        proxy.set_upstream(None);
        let mut world = World {
            common,
            setting,
            dir: dir.to_path_buf(),
            proxy,
            server: None,
            trainer: None,
            log,
            seen: Arc::default(),
            n_gave_up: 0,
            killed: false,
        };
        world.start_server()?;
        world.start_trainer()?;
        Ok(world)
    }

    pub fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    pub fn output(&self) -> PathBuf {
        self.dir.join("run")
    }

    pub fn start_server(&mut self) -> anyhow::Result<()> {
        let Setting { split: [first, behind], .. } = self.setting;
        let (first, behind) = (first.to_string(), behind.to_string());
        let (config, store) = (self.dir.join("server.toml"), self.store());
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let (config, store, model) = (path(&config), path(&store), path(&model()));
        let mut args = vec!["--config", &config, "--store-dir", &store, "--model-name", &model];
        args.extend(["--split-point-1", &first, "--split-point-2", &behind]);
        args.extend(["--port", "0", "--threads", "1", "--log", "info"]);
        self.log.line("-- server starts");
        let server = Server::start(&self.common.program, &args, &self.log, &self.seen)?;
        self.proxy.set_upstream(Some(server.address));
        self.server = Some(server);
        Ok(())
    }

    /// As a user would: the same command, and `--resume latest` if there is something to resume.
    pub fn start_trainer(&mut self) -> anyhow::Result<()> {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let (model, output) = (path(&model()), path(&self.output()));
        let (server, texts) = (self.proxy.endpoint(), &self.common.texts);
        let n_steps = self.common.n_steps.to_string();
        let save_interval = self.setting.save_interval.to_string();
        let mut args: Vec<String> = [
            ["--model-name", &model],
            ["--server", &server],
            ["--output-dir", &output],
            ["--train-file", &path(&texts.train_file(self.setting))],
            ["--max-steps", &n_steps],
            ["--save-interval", &save_interval],
            ["--batch-size", "2"],
            // Within what the smallest server takes.
            ["--max-seq-length", "128"],
            ["--learning-rate", "3e-3"],
            ["--log-interval", "1"],
            ["--log", "warn,offshoot_client=info,offshoot_trainer=info"],
        ]
        .concat()
        .into_iter()
        .map(String::from)
        .collect();
        args.extend(["--no-cache".into(), "--no-tensorboard".into()]);
        if !self.setting.preferences {
            args.extend(["--eval-file".into(), path(&texts.eval_file())]);
        }
        args.extend(self.setting.train.split_whitespace().map(String::from));
        if self.has_checkpoint()? {
            args.extend(["--resume".into(), "latest".into()]);
        }
        self.log.line(&format!("-- trainer starts: {}", args.join(" ")));
        self.trainer = Some(train(&self.common.program, &args, &self.log, &self.seen)?);
        Ok(())
    }

    fn has_checkpoint(&self) -> anyhow::Result<bool> {
        if !self.output().is_dir() {
            return Ok(false);
        }
        for entry in fs::read_dir(self.output())? {
            let entry = entry?;
            let name = entry.file_name();
            let is_checkpoint = name.to_string_lossy().starts_with("checkpoint_step_");
            if is_checkpoint && entry.path().join("training_state.json").exists() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// `kill -9`.
    pub fn kill_server(&mut self) -> anyhow::Result<()> {
        self.proxy.set_upstream(None);
        if let Some(mut server) = self.server.take() {
            ensure!(server.process.kill()?, "the server had ended by itself; its log says why");
            self.log.line("-- server killed");
        }
        Ok(())
    }

    /// `kill -9`. Whether there was something to kill.
    pub fn kill_trainer(&mut self) -> anyhow::Result<bool> {
        let Some(trainer) = &mut self.trainer else { return Ok(false) };
        let killed = trainer.kill()?;
        self.killed = killed;
        if killed {
            self.log.line("-- trainer killed");
        }
        Ok(killed)
    }

    /// SIGTERM, and until it has ended. It must say that it lost nothing.
    pub fn drain_server(&mut self) -> anyhow::Result<()> {
        let server = self.server.take().context("a server runs")?;
        self.log.line("-- server is asked to end");
        let status = server.drain()?;
        self.proxy.set_upstream(None);
        ensure!(status.success(), "the drained server ended with {status}");
        Ok(())
    }

    /// Whether the trainer runs.
    pub fn look(&mut self) -> anyhow::Result<Trainer> {
        let Some(trainer) = &mut self.trainer else { return Ok(Trainer::Ended) };
        Ok(match trainer.ended()? {
            None => Trainer::Runs,
            Some(status) if status.success() => Trainer::Done,
            Some(status) => {
                if !self.killed {
                    self.n_gave_up += 1;
                    self.log.line(&format!("-- the trainer gave up: {status}"));
                }
                self.killed = false;
                self.trainer = None;
                Trainer::Ended
            }
        })
    }

    /// Whatever is missing is started again.
    pub fn mend(&mut self) -> anyhow::Result<Trainer> {
        let ended = match &mut self.server {
            Some(server) => server.process.ended()?,
            None => None,
        };
        if let Some(status) = ended {
            anyhow::bail!("the server ended by itself: {status}; see the log");
        }
        if self.server.is_none() {
            self.start_server()?;
        }
        match self.look()? {
            Trainer::Ended => {
                self.start_trainer()?;
                Ok(Trainer::Runs)
            }
            other => Ok(other),
        }
    }

    /// Until so many more steps are taken than `before`, or the trainer has ended. It is started again
    /// if it gives up.
    pub fn wait_for_steps(&mut self, before: u64, n: u64) -> anyhow::Result<Trainer> {
        let begun = Instant::now();
        loop {
            let trainer = self.mend()?;
            if trainer == Trainer::Done || self.seen.steps() >= before + n {
                return Ok(trainer);
            }
            ensure!(begun.elapsed() < PATIENCE, "no step in {PATIENCE:?}: the run is stuck");
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// Until something is so, or the time is over. Whether it is so.
    pub fn wait_until(&self, patience: Duration, is_so: impl Fn(&Self) -> bool) -> bool {
        let begun = Instant::now();
        while !is_so(self) {
            if begun.elapsed() > patience {
                return false;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        true
    }
}

/// Four layers, vocabulary 320.
pub fn model() -> PathBuf {
    offshoot_tests::fixture("tiny_text")
}
