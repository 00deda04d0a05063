// Command bench runs the benchmarks that meshca is judged by, prints their figures as a table beside what they should
// be, and writes them as JSON together with the machine they were measured on. Nothing fails because a figure is missed:
// machines are noisy; read the table.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// figure is one metric of one benchmark.
type figure struct {
	Benchmark string  `json:"benchmark"`
	Metric    string  `json:"metric"`
	Value     float64 `json:"value"`
	// Target is what a ratio should be; empty for what has none.
	Target string `json:"target,omitempty"`
	Met    *bool  `json:"met,omitempty"`
}

// target is a bound for a metric.
type target struct {
	least, most float64
	what        string
}

// targets by benchmark and metric. Ratios are to a floor that was measured in the same run.
var targets = map[string]target{
	"BenchmarkIssueOneCSRACall of-floor":            {least: 0.80, what: "at least 0.80 of the floor"},
	"BenchmarkIssueBatchesOf100CSRs of-floor":       {least: 0.80, what: "at least 0.80 of the floor"},
	"BenchmarkPush memory-ratio":                    {most: 1.15, what: "at most 1.15 of a bare server"},
	"BenchmarkPush push-ratio":                      {most: 1.3, what: "at most 1.3 of a bare server"},
	"BenchmarkRenewals first-cycle-busiest-of-mean": {most: 1.5, what: "at most 1.5 of the mean"},
	"BenchmarkRenewals busiest-of-mean":             {most: 1.5, what: "at most 1.5 of the mean"},
}

var packages = []string{"./test/bench/issuance", "./test/bench/sds", "./test/bench/fleet"}

// machine is where the figures were measured.
type machine struct {
	CPU    string    `json:"cpu"`
	Cores  int       `json:"cores"`
	OS     string    `json:"os"`
	Go     string    `json:"go"`
	Load   string    `json:"loadBefore"`
	Commit string    `json:"commit"`
	Time   time.Time `json:"time"`
}

func main() {
	out := flag.String("json", "", "write the figures to this file as JSON")
	flag.Parse()
	if err := run(*out); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(out string) error {
	m := describeMachine()
	var figures []figure
	for _, p := range packages {
		fmt.Fprintf(os.Stderr, "running %s\n", p)
		c := exec.Command("go", "test", "-run", "^$", "-bench", ".", "-benchtime", "1x", "-timeout", "30m", p)
		var text bytes.Buffer
		c.Stdout, c.Stderr = &text, os.Stderr
		err := c.Run()
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", p, err, text.String())
		}
		found, err := parse(&text)
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		figures = append(figures, found...)
	}
	table(os.Stdout, m, figures)
	if out == "" {
		return nil
	}
	data, err := json.MarshalIndent(struct {
		Machine machine  `json:"machine"`
		Figures []figure `json:"figures"`
	}{m, figures}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(out, append(data, '\n'), 0o644)
}

// parse reads the lines of `go test -bench`: a name, a count, then values with their units.
func parse(r io.Reader) ([]figure, error) {
	var figures []figure
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || !strings.HasPrefix(fields[0], "Benchmark") {
			continue
		}
		name := fields[0]
		if i := strings.LastIndexByte(name, '-'); i > 0 {
			name = name[:i]
		}
		for i := 2; i+1 < len(fields); i += 2 {
			value, err := strconv.ParseFloat(fields[i], 64)
			if err != nil {
				return nil, fmt.Errorf("%q: %w", lines.Text(), err)
			}
			if fields[i+1] == "ns/op" {
				continue // one iteration is a whole comparison
			}
			figures = append(figures, judge(figure{Benchmark: name, Metric: fields[i+1], Value: value}))
		}
	}
	if len(figures) == 0 {
		return nil, fmt.Errorf("no benchmark reported a figure")
	}
	return figures, lines.Err()
}

func judge(f figure) figure {
	t, ok := targets[f.Benchmark+" "+f.Metric]
	if !ok {
		return f
	}
	met := f.Value >= t.least && (t.most == 0 || f.Value <= t.most)
	f.Target, f.Met = t.what, &met
	return f
}

func table(w io.Writer, m machine, figures []figure) {
	fmt.Fprintf(w, "%s, %d cores, %s, %s, load before %s, commit %s\n\n", m.CPU, m.Cores, m.OS, m.Go, m.Load, m.Commit)
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "BENCHMARK\tMETRIC\tVALUE\tTARGET\tMET")
	for _, f := range figures {
		met := ""
		if f.Met != nil {
			met = map[bool]string{true: "yes", false: "NO"}[*f.Met]
		}
		fmt.Fprintf(t, "%s\t%s\t%.4g\t%s\t%s\n", strings.TrimPrefix(f.Benchmark, "Benchmark"), f.Metric, f.Value, f.Target, met)
	}
	_ = t.Flush()
}

func describeMachine() machine {
	m := machine{Cores: runtime.NumCPU(), OS: runtime.GOOS + "/" + runtime.GOARCH, Go: runtime.Version(), Time: time.Now().UTC(), CPU: "unknown CPU", Load: "unknown", Commit: "unknown"}
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, after, ok := strings.Cut(string(data), "model name"); ok {
			line, _, _ := strings.Cut(after, "\n")
			m.CPU = strings.Trim(line, "\t :")
		}
	}
	if data, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load, _, _ = strings.Cut(string(data), " ")
	}
	if out, err := exec.Command("git", "rev-parse", "--short", "HEAD").Output(); err == nil {
		m.Commit = strings.TrimSpace(string(out))
	}
	return m
}
