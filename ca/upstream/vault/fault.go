package vault

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/hashicorp/vault/api"
)

// Kind is what went wrong with a call to Vault: a bounded set, fit for a metric's label.
type Kind string

// The kinds of faults.
const (
	KindNone        Kind = ""            // nothing
	KindUnreachable Kind = "unreachable" // no connection, or it broke
	KindTLS         Kind = "tls"         // Vault's certificate is not trusted
	KindTimeout     Kind = "timeout"     // no answer in time; it may have taken effect
	KindSealed      Kind = "sealed"
	KindDenied      Kind = "denied"    // 403, also under a fresh login
	KindLogin       Kind = "login"     // Vault did not let us in
	KindFile        Kind = "file"      // a file that the configuration names cannot be used
	KindMissing     Kind = "missing"   // no such mount or issuer
	KindRejected    Kind = "rejected"  // Vault does not do what was asked
	KindFailed      Kind = "failed"    // Vault failed (5xx), or asks for patience (429)
	KindMalformed   Kind = "malformed" // an answer that is none of Vault's
	KindCanceled    Kind = "canceled"  // we gave up
	KindOther       Kind = "other"
)

// Fault is a failed call: what failed, why, and what to do. It holds no credential.
type Fault struct {
	Kind Kind
	What string
	// Why is in Vault's words where it said any.
	Why string
	// Do is empty where it goes by itself.
	Do    string
	cause error
}

// Error joins its parts.
func (f *Fault) Error() string {
	text := "vault: " + f.What + ": " + f.Why
	if f.Do != "" {
		text += ". " + f.Do
	}
	return text
}

// Unwrap gives the end of a context and the like; an answer of Vault's is never in it.
func (f *Fault) Unwrap() error { return f.cause }

// KindOf says what kind of fault an error is.
func KindOf(err error) Kind {
	if err == nil {
		return KindNone
	}
	if f, ok := errors.AsType[*Fault](err); ok {
		return f.Kind
	}
	return KindOther
}

// denied reports whether Vault answered 403: it did nothing.
func denied(err error) bool {
	answer, ok := errors.AsType[*api.ResponseError](err)
	return ok && answer.StatusCode == http.StatusForbidden
}

// explain makes a Fault of whatever a call failed with.
func explain(c Config, r request, err error, known ...secret) error {
	if err == nil {
		return nil
	}
	if f, ok := errors.AsType[*Fault](err); ok {
		return f
	}
	f := &Fault{What: r.what}
	if answer, ok := errors.AsType[*api.ResponseError](err); ok {
		f.fromAnswer(c, r, answer, known)
		return f
	}
	f.fromTransport(c, err, known)
	return f
}

func (f *Fault) fromAnswer(c Config, r request, answer *api.ResponseError, known []secret) {
	said := scrub(strings.Join(answer.Errors, "; "), known...)
	f.Kind, f.Why = KindRejected, fmt.Sprintf("Vault answered %d", answer.StatusCode)
	if said != "" {
		f.Why += " (" + said + ")"
	}
	switch code := answer.StatusCode; {
	case code == http.StatusForbidden:
		f.Kind = KindDenied
		f.Do = fmt.Sprintf("If the login stands, its policies lack %q on %s: add\n%s", r.capability, r.path, rule(r.path, r.capability))
	case code == http.StatusNotFound:
		f.Kind = KindMissing
		f.Do = fmt.Sprintf("Look at upstream.vault.mount (%q) and namespace (%q): `vault secrets list` shows the mounts, and the type must be pki", c.Mount, c.Namespace)
	case code == http.StatusServiceUnavailable && strings.Contains(said, "sealed"):
		f.Kind, f.Why = KindSealed, "Vault is sealed"
		f.Do = "Unseal it: vault operator unseal"
	case code == http.StatusTooManyRequests:
		f.Kind, f.Do = KindFailed, "Vault limits how often it is called (`vault list sys/quotas/rate-limit`)"
	case code >= http.StatusInternalServerError && strings.Contains(said, "unable to find PKI issuer"):
		f.Kind, f.Do = KindMissing, fmt.Sprintf("`vault list -detailed %s/issuers` shows those there are. Bring it back, or "+
			"have another one sign: `certctl ca rotate root --issuer REF`, also where the same root was imported again and has another issuer_id", c.Mount)
	case code >= http.StatusInternalServerError:
		f.Kind = KindFailed
	}
}

func (f *Fault) fromTransport(c Config, err error, known []secret) {
	network, isNetwork := errors.AsType[net.Error](err)
	f.Why = scrub(err.Error(), known...)
	if call, ok := errors.AsType[*url.Error](err); ok { // the URL says no more than what was tried
		f.Why = scrub(call.Err.Error(), known...)
	}
	switch {
	case errors.Is(err, context.Canceled):
		f.Kind, f.Why, f.cause = KindCanceled, "given up", context.Canceled
	case errors.Is(err, context.DeadlineExceeded), isNetwork && network.Timeout():
		f.Kind, f.cause = KindTimeout, context.DeadlineExceeded
		f.Why = fmt.Sprintf("no answer came from %s in time (upstream.vault.timeout is %s)", c.Address, c.Timeout.Duration)
	case isTLSTrust(err):
		f.Kind = KindTLS
		f.Do = "Put the CA that signed Vault's TLS certificate into upstream.vault.caFile, and look that the address has a name that stands in the certificate"
	case errors.Is(err, errTooLong), isNonsense(err):
		f.Kind = KindMalformed
		f.Do = fmt.Sprintf("Look what answers at %s: it does not speak as Vault does", c.Address)
	case isNetwork:
		f.Kind = KindUnreachable
		f.Do = fmt.Sprintf("Look whether Vault runs at %s and can be reached from here", c.Address)
	default:
		f.Kind = KindOther
	}
}
