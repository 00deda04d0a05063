package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/api/admin/client"
	"github.com/meshca/meshca/api/refusal"
)

// failure is how a command ends otherwise than fine: "what happened: why. next step".
type failure struct {
	code            int
	what, why, next string
	// silent failures have said what there is to say in the output.
	silent bool
}

func (f *failure) Error() string {
	s := f.what
	if f.why != "" {
		s += ": " + f.why
	}
	if f.next != "" {
		s = strings.TrimSuffix(s, ".") + ". " + f.next
	}
	return plain(s)
}

// negative is the end of a verb whose output already says no.
var negative = &failure{code: exitNo, silent: true, what: "no"}

// interrupted is how a verb ends that a signal ended.
var interrupted = &failure{code: exitNo, what: "interrupted"}

func usage(format string, args ...any) error {
	return &failure{code: exitUsage, what: fmt.Sprintf(format, args...), next: "See `certctl --help`"}
}

// no says that something is not there or not so.
func no(what string, err error, next string) error {
	why := ""
	if err != nil {
		why = err.Error()
	}
	return &failure{code: exitNo, what: what, why: why, next: next}
}

// who is a daemon behind an admin socket.
type who struct{ name, daemon, flag string }

var (
	theCA    = who{"the CA", "meshca", "--socket"}
	theAgent = who{"the agent", "meshca-agent", "--agent"}
)

// unreachable explains why a socket could not be connected to, each fault with its own next step.
func (w who) unreachable(err error) *failure {
	var e *client.Error
	if !errors.As(err, &e) {
		return &failure{code: exitUnreachable, what: "cannot reach " + w.name, why: err.Error()}
	}
	f := &failure{code: exitUnreachable, what: fmt.Sprintf("cannot reach %s at %s", w.name, e.Socket)}
	switch e.Fault {
	case client.Absent:
		f.why = "there is no such socket"
		f.next = fmt.Sprintf("Is %s running on this machine? If its socket is elsewhere, name it with %s=PATH", w.daemon, w.flag)
	case client.Refused:
		f.why = "the socket is there, and nobody answers at it"
		f.next = fmt.Sprintf("%s has stopped or is still starting: look at its log", w.daemon)
	case client.Forbidden:
		f.why = "permission denied"
		f.next = fmt.Sprintf("Only root and the user that runs %s may open it: try again with sudo", w.daemon)
	case client.NotASocket:
		f.why = "it is no socket"
		f.next = fmt.Sprintf("Name the admin socket with %s=PATH", w.flag)
	case client.NoAnswer:
		f.why = "it did not take the connection in time"
		f.next = fmt.Sprintf("%s is overloaded or stopped by a debugger; try a longer --timeout", w.daemon)
	case client.Unreachable:
		f.why = e.Err.Error()
	}
	return f
}

// failed explains the error of a call.
func (w who) failed(err error) error {
	if e, ok := refusal.From(err); ok {
		return &failure{code: exitNo, what: w.name + " refused", why: fmt.Sprintf("%s (%s)", e.Detail, e.Reason), next: strings.TrimSuffix(e.Reason.Do(), ".")}
	}
	st, _ := status.FromError(err)
	switch st.Code() {
	case codes.Unavailable:
		return &failure{code: exitUnreachable, what: w.name + " ended the connection", why: st.Message(), next: "If it was restarted, try again; else look at its log"}
	case codes.DeadlineExceeded:
		return &failure{code: exitUnreachable, what: w.name + " gave no answer in time", next: "Try a longer --timeout, and look at its log"}
	case codes.Unimplemented:
		return &failure{code: exitNo, what: w.name + " does not know this question", why: st.Message(),
			next: "It is of another version, or the socket is not " + w.name + "'s: --socket is for the CA's, --agent for the agent's"}
	case codes.Canceled:
		return interrupted
	}
	if errors.Is(err, context.Canceled) {
		return interrupted
	}
	return &failure{code: exitNo, what: w.name + " could not do it", why: st.Message()}
}
