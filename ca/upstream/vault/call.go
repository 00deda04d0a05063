package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"time"

	"github.com/hashicorp/vault/api"
)

// Operation is what a call to Vault is for.
type Operation string

// The operations.
const (
	OpLogin  Operation = "login"
	OpRenew  Operation = "renew" // of the login
	OpList   Operation = "list"  // of the issuers
	OpRead   Operation = "read"  // of an issuer
	OpSign   Operation = "sign"
	OpLookUp Operation = "lookup" // of what this login may do
	// OpRely is no call of its own: each look at the issuers ends with whether those that sign (Rely) may be read and can go on,
	// whoever the configuration names. What is read of others says nothing of that.
	OpRely Operation = "rely"
)

// Call is one use of Vault, for logs and metrics.
type Call struct {
	Operation Operation
	Took      time.Duration
	// Err is a *Fault where it failed.
	Err error
	// Asked and Got are the lives of an intermediate, for OpSign. Vault shortens without an error.
	Asked, Got time.Duration
	// Candidate says that it was about an issuer that nobody named. That it is denied says nothing of Vault or our login.
	Candidate bool
}

// Shortened reports whether Vault gave an intermediate a shorter life than it was asked for, beyond what clocks differ by.
func (c Call) Shortened() bool { return c.Asked > 0 && c.Err == nil && c.Got < c.Asked-time.Minute }

// request is one call under a login.
type request struct {
	operation Operation
	what      string // for people
	path      string
	// capability is what a policy must grant on path.
	capability string
	query      map[string][]string
	body       any // nil: GET
	// candidate says that it is about an issuer that nobody named.
	candidate bool
}

// envelope is the form of Vault's answers.
type envelope struct {
	Data     json.RawMessage `json:"data"`
	Auth     *api.SecretAuth `json:"auth"`
	Warnings []string        `json:"warnings"`
}

// errNonsense is an answer that is no JSON of the form that it should have.
var errNonsense = errors.New("the answer is none that Vault gives")

func isNonsense(err error) bool { return errors.Is(err, errNonsense) }

// send makes one call, once, and decodes the answer's data.
func send(ctx context.Context, client *api.Client, r request, data any) (envelope, error) {
	if r.body != nil {
		return sendBody(ctx, client, r, data)
	}
	resp, err := client.Logical().ReadRawWithDataWithContext(ctx, r.path, r.query)
	if resp != nil {
		defer resp.Body.Close()
	}
	if err != nil {
		return envelope{}, err
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return envelope{}, err
	}
	return decode(text, data)
}

// sendBody does not use the library's WriteRaw, which sends an empty body on when a standby redirects it.
func sendBody(ctx context.Context, client *api.Client, r request, data any) (envelope, error) {
	text, err := json.Marshal(r.body)
	if err != nil {
		return envelope{}, err
	}
	var body map[string]any
	if err := json.Unmarshal(text, &body); err != nil {
		return envelope{}, err
	}
	answer, err := client.Logical().WriteWithContext(ctx, r.path, body)
	if err != nil {
		return envelope{}, nonsense(err)
	}
	if answer == nil { // 204
		answer = &api.Secret{}
	}
	e := envelope{Auth: answer.Auth, Warnings: answer.Warnings}
	if answer.Data != nil {
		if e.Data, err = json.Marshal(answer.Data); err != nil {
			return envelope{}, errNonsense
		}
	}
	return e, e.into(data)
}

// nonsense makes errNonsense of what the library could not read.
func nonsense(err error) error {
	_, syntax := errors.AsType[*json.SyntaxError](err)
	_, form := errors.AsType[*json.UnmarshalTypeError](err)
	_, transport := errors.AsType[*url.Error](err) // of a connection that broke, not of a text that is cut short
	if syntax || form || errors.Is(err, io.ErrUnexpectedEOF) && !transport {
		return errNonsense
	}
	return err
}

// decode reads an answer. What a JSON error shows of it is a type and a place, never the content.
func decode(text []byte, data any) (envelope, error) {
	var e envelope
	if err := json.Unmarshal(text, &e); err != nil {
		return envelope{}, errNonsense
	}
	return e, e.into(data)
}

// into decodes the data, where any is wanted.
func (e envelope) into(data any) error {
	if data == nil {
		return nil
	}
	if len(e.Data) == 0 {
		return fmt.Errorf("%w: it has no data", errNonsense)
	}
	if err := json.Unmarshal(e.Data, data); err != nil {
		return fmt.Errorf("%w: its data has another form", errNonsense)
	}
	return nil
}

// call makes a call under our login. A 403 has it log in afresh, once, and try again: the login may have been revoked, or
// its role have got other policies. Nothing else is tried again. A policy may leave out what nobody named, so there a 403
// is no failure, and brings no login.
func (u *Upstream) call(ctx context.Context, r request, data any) (envelope, error) {
	began := time.Now()
	e, err := u.tryCall(ctx, r, data)
	if !r.candidate || KindOf(err) != KindDenied {
		u.state.called(r.operation, err)
	}
	if r.operation != OpSign { // which is observed with the lives that were asked for and given
		u.observe(Call{Operation: r.operation, Took: time.Since(began), Err: err, Candidate: r.candidate})
	}
	return e, err
}

func (u *Upstream) tryCall(ctx context.Context, r request, data any) (envelope, error) {
	ctx, cancel := context.WithTimeout(ctx, u.c.Timeout.Duration)
	defer cancel()
	s, err := u.login.session(ctx)
	if err != nil {
		return envelope{}, err
	}
	e, err := send(ctx, s.client, r, data)
	if denied(err) && !r.candidate && u.login.worthwhile(ctx, s, r.operation) {
		fresh, failed := u.login.afresh(ctx, s)
		if failed != nil {
			return envelope{}, fmt.Errorf("%w (tried because Vault answered 403 to: %s)", failed, r.what)
		}
		s = fresh
		e, err = send(ctx, s.client, r, data)
		u.login.helped(!denied(err))
	}
	if err == nil {
		for i, w := range e.Warnings {
			e.Warnings[i] = scrub(w, append(slices.Clone(s.secrets), s.granted.token)...)
		}
		return e, nil
	}
	if isTLSTrust(err) {
		u.login.drop(s) // the next call reads the CA file again
	}
	return envelope{}, explain(u.c, r, err, s.secrets...)
}
