package files

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/meshca/meshca/api/refusal"
)

// Hook tells a process that the files changed. Exactly one of the three is set.
type Hook struct {
	Signal  *Signal
	Command *Command
	HTTP    *HTTP
}

const (
	// defaultTimeout and maxTimeout bound a command and a request.
	defaultTimeout = 30 * time.Second
	maxTimeout     = 5 * time.Minute
	// maxSaid is how much is kept of what a command or a server said, in bytes.
	maxSaid = 2 << 10
)

// errNobody is what a signal says when the process that it is for does not run.
var errNobody = errors.New("nobody runs who could be told")

// errStarting is what a signal says when the process has just begun to run, and may not take signals yet.
var errStarting = errors.New("the process is starting")

// settle is how long a process is left alone after it was told, and after it started. One that reads its files anew, or
// for the first time, may lose a signal that comes meanwhile (HAProxy does), and would serve what it read until the next
// rotation. Changes that come together are then told once, too.
const settle = 3 * time.Second

// teller does what a hook says.
type teller interface {
	// tell returns nil once the process knows, errNobody when there is none, and errStarting when it is too early. secrets
	// are what no error may repeat.
	tell(ctx context.Context, secrets []string) error
	// String says in words what is done, for status and logs.
	String() string
}

func (h *Hook) check() error {
	set := 0
	var errs []error
	if h.Signal != nil {
		set++
		errs = append(errs, h.Signal.check())
	}
	if h.Command != nil {
		set++
		errs = append(errs, h.Command.check())
	}
	if h.HTTP != nil {
		set++
		errs = append(errs, h.HTTP.check())
	}
	if set != 1 {
		return errors.New("name one of signal, command and http")
	}
	return errors.Join(errs...)
}

// teller is the one that is set.
func (h *Hook) teller(dir string) teller {
	switch {
	case h == nil:
		return nil
	case h.Signal != nil:
		return *h.Signal
	case h.Command != nil:
		return runner{*h.Command, dir}
	default:
		return *h.HTTP
	}
}

// timeoutOf is a hook's timeout, completed.
func timeoutOf(d time.Duration) time.Duration {
	if d == 0 {
		return defaultTimeout
	}
	return d
}

func checkTimeout(d time.Duration) error {
	if d < 0 || d > maxTimeout {
		return fmt.Errorf("timeout %v: from more than 0 to %v", d, maxTimeout)
	}
	return nil
}

// said makes what a command or a server said fit for a log: one line, bounded, and nothing of it where it repeats a key.
func said(output string, secrets []string) string {
	if strings.Contains(output, "PRIVATE KEY") {
		return "(withheld: it holds a key)"
	}
	for _, s := range secrets {
		if strings.Contains(output, s) {
			return "(withheld: it holds a key)"
		}
	}
	line := strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) || !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(output, " "))
	return refusal.Clip(strings.Join(strings.Fields(line), " "), 512)
}

// piece is the length of the parts of a key that are looked for: output may begin or break off within a line.
const piece = 16

// secretsOf are the parts of the key's PEM in a generation, without its frame.
func secretsOf(files map[string]file) []string {
	var list []string
	for _, f := range files {
		if !f.secret {
			continue
		}
		for line := range strings.Lines(string(f.data)) {
			line = strings.TrimSpace(line)
			if strings.HasPrefix(line, "-----END") {
				break // what follows a key in its file is public
			}
			for ; len(line) >= piece && !strings.HasPrefix(line, "-----"); line = line[piece:] {
				list = append(list, line[:piece])
			}
		}
	}
	return list
}
