// Package refusal holds the one enum of reasons for which meshca says no, a sentence on each that tells what to do,
// and its form on the wire: a gRPC status with google.rpc.ErrorInfo{reason, domain: "meshca"}.
//
// It is the one package of ours that every other may import.
package refusal

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
)

// Domain is the ErrorInfo domain of every refusal.
const Domain = "meshca"

// Reason names why something was refused: UPPER_SNAKE_CASE, stable, bounded in number (it is a metric label).
type Reason string

// Error is a refusal: its reason, and what of this very case a person needs to know. It never holds a token or a key.
type Error struct {
	Reason Reason
	// Detail says what was found and what was expected, in one sentence without a final period.
	Detail string
	// Claim names the claim or field that the refusal turned on, such as `kubernetes.io.pod.uid`; often empty. It stays
	// with the CA (audit, explain) and does not travel.
	Claim string
	// RetryAfter is when another try makes sense; zero leaves that to the caller's backoff.
	RetryAfter time.Duration

	cause error
}

// maxDetail bounds a detail in bytes: it goes to answers, audit lines and memory, and may repeat what a stranger sent.
const maxDetail = 1024

// New makes a refusal. A %w operand becomes its cause: errors.Is and errors.As see it, the wire does not. The detail is
// cut at a kilobyte and made valid UTF-8, whatever went into it.
func New(reason Reason, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Reason: reason, Detail: Clip(err.Error(), maxDetail), cause: errors.Unwrap(err)}
}

// Clip bounds a text that a stranger may have written: at most n bytes, valid UTF-8.
func Clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "")
}

// EndsLife reports whether a refusal says that who an SVID was for is no more: what was given for it ends with it.
func (r Reason) EndsLife() bool {
	switch r {
	case PodGone, PodRecreated, PodFinished, ServiceAccountGone, NamespaceGone, NodeGone:
		return true
	}
	return false
}

// After returns a copy that tells the caller to try again in d.
func (e *Error) After(d time.Duration) *Error {
	c := *e
	c.RetryAfter = d
	return &c
}

// On returns a copy that names the claim or field it turned on.
func (e *Error) On(claim string) *Error {
	c := *e
	c.Claim = claim
	return &c
}

func (e *Error) Error() string {
	if e.Detail == "" {
		return string(e.Reason)
	}
	return string(e.Reason) + ": " + e.Detail
}

// Unwrap returns the cause, if one was given.
func (e *Error) Unwrap() error { return e.cause }

// Is makes errors.Is(err, refusal.New(reason, "")) match on the reason alone.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Reason == e.Reason && t.Detail == ""
}

// Code is the gRPC code that the reason travels under.
func (r Reason) Code() codes.Code {
	if e, ok := table[r]; ok {
		return e.code
	}
	return codes.Unknown
}

// Known reports whether r is one of the enum's.
func (r Reason) Known() bool { _, ok := table[r]; return ok }

// What says in a sentence what the reason means; Do says what to change.
func (r Reason) What() string { return table[r].what }

// Do says in a sentence what the person who reads it should do next.
func (r Reason) Do() string { return table[r].do }

// Passing reports whether the same request can succeed later without anyone changing anything: a dependency that is
// down, an overload. Callers retry these with backoff, and never report them as a final no.
func (r Reason) Passing() bool {
	switch r.Code() {
	case codes.Unavailable, codes.ResourceExhausted:
		return true
	}
	return false
}

// Parse finds the reason that a person typed: case and dashes do not matter.
func Parse(s string) (Reason, error) {
	r := Reason(strings.ReplaceAll(strings.ToUpper(strings.TrimSpace(s)), "-", "_"))
	if !r.Known() {
		return "", fmt.Errorf("no refusal is called %q: `certctl explain` lists them all", s)
	}
	return r, nil
}

// Of returns the reason of err: of the first refusal in its tree, of a gRPC status that carries one;
// CallEnded for a context that ended, else Internal.
// It returns "" for nil.
func Of(err error) Reason {
	if err == nil {
		return ""
	}
	if e, ok := From(err); ok {
		return e.Reason
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return CallEnded
	}
	return Internal
}
