use super::*;

/// A run of ten steps whose loss falls from 3 by a quarter each step, with two evaluations.
fn write_run(dir: &Path, name: &str, shift: f64) -> PathBuf {
    let run = dir.join(name);
    std::fs::create_dir(&run).unwrap();
    let mut text = String::from(
        "{\"event\":\"start\",\"step\":0,\"n_steps\":12,\"model\":\"models/tiny\",\"loss\":\"cross-entropy\"}\n",
    );
    for step in 1..=10 {
        let (loss, rate) = (3.0 + shift - 0.25 * step as f64, 1e-4 * step as f64);
        text += &format!(
            "{{\"event\":\"step\",\"step\":{step},\"loss\":{loss},\"learning_rate\":{rate},\"tokens_per_second\":100}}\n"
        );
        if step == 1 || step == 10 {
            text += &format!("{{\"event\":\"eval\",\"step\":{step},\"loss\":{}}}\n", loss + 0.5);
        }
    }
    std::fs::write(run.join("metrics.jsonl"), text).unwrap();
    run
}

fn runs(paths: &[PathBuf]) -> Vec<Run> {
    let logs = paths.iter().map(|run| RunLog::read(run).unwrap());
    curves::names(paths).into_iter().zip(logs).map(|(name, log)| Run::new(name, log, 1)).collect()
}

#[test]
fn a_run_on_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let one = runs(&[write_run(dir.path(), "run", 0.0)]);
    let terminal = Terminal { columns: 60, colours: false };
    let drawn = terminal.draw(&one, 1);
    println!("{drawn}");
    assert_eq!(drawn, EXPECTED);
    // Where there are colours, there is nothing else that the plain one lacks.
    let coloured = Terminal { columns: 60, colours: true }.draw(&one, 1);
    assert!(coloured.contains("\x1b[38;5;33m"), "{coloured}");
    let plain = coloured.split('\x1b').map(|part| part.split_once('m').map_or(part, |(_, t)| t));
    assert_eq!(plain.collect::<String>().lines().count(), drawn.lines().count());
}

/// The training loss passes 2 at step 4, a third of the way, and the axes say so.
const EXPECTED: &str = "\
run: tiny, 10 of 12 steps

loss (nats per token)
       │●
     3 ┤
       │
       │⠐⠢⢄⡀
       │   ⠈⠑⠢⢄⡀
       │       ⠈⠑⠢⢄⡀
       │           ⠈⠑⠢⢄⣀
     2 ┤                ⠉⠒⠢⢄⡀
       │                    ⠈⠑⠢⠤⣀
       │                         ⠉⠒⠤⣀
       │                             ⠉⠒⠤⣀
       │                                 ⠉⠒⠤⣀
     1 ┤                                     ⠉⠑⠢⠤⣀         ●
       │                                          ⠉⠒⠤⣀
       │                                              ⠉⠒⠤⣀
       │                                                  ⠉⠂
       └───────────────────────┬───────────────────────────┬
                               5                          10  step
    lr  ▁▂▂▂▂▂▃▃▃▃▃▃▃▃▃▃▃▃▄▄▄▄▄▅▅▅▅▅▅▆▆▆▆▆▆▆▆▆▆▆▇▇▇▇▇▇██████

⠤⠤ training   ● evaluation

run  training 2.7500 -> 0.5000   evaluation 3.2500 -> 1.0000, best 1.0000 at step 10   lr up to 1e-3   100 tokens/s
";

#[test]
fn several_runs_are_told_apart_without_colours() {
    let dir = tempfile::tempdir().unwrap();
    let two = runs(&[write_run(dir.path(), "r8", 0.0), write_run(dir.path(), "r16", 0.6)]);
    let drawn = Terminal { columns: 60, colours: false }.draw(&two, 1);
    println!("{drawn}");
    assert!(drawn.contains("a A r8   b B r16"));
    let plot: Vec<_> = drawn.lines().filter(|line| line.contains(['│', '┤'])).collect();
    let count = |letter: char| plot.iter().map(|line| line.matches(letter).count()).sum::<usize>();
    assert!(count('a') > 20 && count('b') > 20 && count('A') == 2 && count('B') == 2);
    assert_eq!(count('⠁'), 0);
}

#[test]
fn the_picture_has_every_curve() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("loss.png");
    let paths = [write_run(dir.path(), "r8", 0.0), write_run(dir.path(), "r16", 0.6)];
    for n in [1, 2] {
        png::write(&path, &runs(&paths[..n]), 1).unwrap();
        let file = std::io::BufReader::new(std::fs::File::open(&path).unwrap());
        let mut reader = ::png::Decoder::new(file).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let size = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((size.width, size.height), (1000, 640));
        let count = |colour: [u8; 3]| pixels.chunks(3).filter(|pixel| *pixel == colour).count();
        // The two runs' curves, or the run's and its evaluations; the paper.
        let (blue, orange) = (count([33, 115, 181]), count([230, 115, 0]));
        println!("{n} runs: {blue} blue, {orange} orange");
        assert!(blue > 1000 && orange > if n == 1 { 80 } else { 1000 });
        assert!(count([255, 255, 255]) > 500_000);
    }
}

#[test]
fn a_plot_goes_where_the_run_is() {
    let dir = tempfile::tempdir().unwrap();
    let run = write_run(dir.path(), "run", 0.0);
    let file = run.join("metrics.jsonl");
    assert_eq!(usual_output(std::slice::from_ref(&run)), run.join("loss.png"));
    assert_eq!(usual_output(&[file]), run.join("loss.png"));
    assert_eq!(usual_output(&[run.clone(), run]), Path::new("loss.png"));
}
