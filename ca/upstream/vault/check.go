package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
)

// tolerated is how far clocks may differ before Check says so: certificates are set back by more.
const tolerated = 30 * time.Second

// Finding is something that Check found wrong between us and Vault.
type Finding struct {
	// Warning: it works all the same, for now.
	Warning bool
	// What is wrong, Why that is, and what to Do about it.
	What, Why, Do string
}

// Check tries the way to an intermediate, up to the signing itself, and returns all that is wrong with it; nothing when
// all is well. It changes nothing in Vault but for a login. After the first thing that bars the way it stops.
func (u *Upstream) Check(ctx context.Context) []Finding {
	ctx, cancel := context.WithTimeout(ctx, 4*u.c.Timeout.Duration)
	defer cancel()
	if f := u.checkReach(ctx); f != nil {
		return append([]Finding{*f}, u.checkClock()...)
	}
	found := u.checkClock()
	if _, err := u.login.session(ctx); err != nil {
		return append(found, finding(err, false))
	}
	if f := u.checkMount(ctx); f != nil {
		return append(found, *f)
	}
	issuers, err := u.Issuers(ctx)
	if id := u.named.Load(); id != nil {
		found = append(found, u.checkCapabilities(ctx, *id)...)
	}
	if err != nil {
		if KindOf(err) == KindDenied && slices.ContainsFunc(found, func(f Finding) bool { return strings.Contains(f.Do, "capabilities") }) {
			return found // the capability that lacks is named already
		}
		return append(found, finding(err, false))
	}
	named := issuers[0]
	missing, isMissing := errors.AsType[*Fault](named.Fault)
	switch needed := time.Now().Add(u.o.Life); {
	case isMissing:
		found = append(found, finding(missing, false))
	case named.Fault != nil:
		found = append(found, Finding{What: fmt.Sprintf("the issuer %s (%s) cannot be used", named.Ref, named.Name), Why: named.Fault.Error()})
	case named.NotAfter.Before(needed):
		found = append(found, Finding{Warning: true,
			What: fmt.Sprintf("the issuer %s (%s) ends before an intermediate would", named.Ref, named.Name),
			Why:  fmt.Sprintf("its chain ends at %s, and intermediates live for %s: they are cut short, and nothing is issued once it has ended", stamp(named.NotAfter), u.o.Life),
			Do:   fmt.Sprintf("Make another one with `vault write %s/root/rotate/internal` and rotate to it: certctl ca rotate root --issuer REF", u.c.Mount)})
	}
	if notice := u.Status().Notice; notice != "" {
		found = append(found, Finding{Warning: true, What: "an issuer's name has moved", Why: notice})
	}
	return found
}

// finding makes a Finding of a call's fault.
func finding(err error, warning bool) Finding {
	if f, ok := errors.AsType[*Fault](err); ok {
		return Finding{Warning: warning, What: f.What, Why: f.Why, Do: f.Do}
	}
	return Finding{Warning: warning, What: "asking Vault", Why: scrub(err.Error())}
}

// health is what Vault says of itself to everyone. It is asked outside any namespace, where alone it is served.
type health struct {
	Initialized bool `json:"initialized"`
	Sealed      bool `json:"sealed"`
}

func (u *Upstream) checkReach(ctx context.Context) *Finding {
	what := "reaching Vault at " + u.c.Address
	open := u.c
	open.Namespace = ""
	if open.Auth.Cert != nil {
		open.Auth = AuthConfig{} // its files are the login's matter
	}
	client, closeIdle, err := newClient(open, u.skew)
	if err != nil {
		f := finding(unprepared(err), false)
		return &f
	}
	defer closeIdle()
	ctx, cancel := context.WithTimeout(ctx, u.c.Timeout.Duration)
	defer cancel()
	h, err := askHealth(ctx, client)
	switch {
	case err != nil:
		f := finding(explain(u.c, request{what: what, path: "sys/health"}, err), false)
		return &f
	case !h.Initialized:
		return &Finding{What: what, Why: "Vault is not initialised", Do: "Initialise it: vault operator init"}
	case h.Sealed:
		return &Finding{What: what, Why: "Vault is sealed", Do: "Unseal it: vault operator unseal"}
	}
	return nil
}

func askHealth(ctx context.Context, client *api.Client) (health, error) {
	// Whatever state it is in, it shall answer with a body.
	query := map[string][]string{}
	for _, state := range []string{"uninitcode", "sealedcode", "standbycode", "drsecondarycode", "performancestandbycode", "removedcode", "haunhealthycode"} {
		query[state] = []string{"299"}
	}
	resp, err := client.Logical().ReadRawWithDataWithContext(ctx, "sys/health", query)
	if resp != nil {
		defer resp.Body.Close()
	}
	if err != nil {
		return health{}, err
	}
	var h health
	if err := json.NewDecoder(resp.Body).Decode(&h); err != nil {
		return health{}, errNonsense
	}
	return h, nil
}

func (u *Upstream) checkClock() []Finding {
	ahead := u.skew.ahead()
	if ahead.Abs() <= tolerated {
		return nil
	}
	f := Finding{Warning: true, What: "comparing clocks", Do: "Set the clocks of both machines (NTP)"}
	switch {
	case ahead < 0:
		f.Why = fmt.Sprintf("Vault's clock is %s behind ours: its certificates end that much earlier", -ahead)
	case ahead > backdate:
		f.Warning = false
		f.Why = fmt.Sprintf("Vault's clock is %s ahead of ours: what it signs is not valid yet here, and is refused", ahead)
	default:
		f.Why = fmt.Sprintf("Vault's clock is %s ahead of ours; from %s on what it signs is not valid yet here", ahead, backdate)
	}
	return []Finding{f}
}

// checkMount says when the mount is none, or none of PKI. A login that may not ask is no finding: the next call tells.
func (u *Upstream) checkMount(ctx context.Context) *Finding {
	var mount struct {
		Type string `json:"type"`
	}
	// Vault tells the type of a mount to every login that may do anything in it.
	r := request{operation: OpLookUp, what: "looking at the mount " + u.c.Mount, path: "sys/internal/ui/mounts/" + u.c.Mount, capability: "read"}
	s, err := u.login.session(ctx)
	if err != nil {
		f := finding(err, false)
		return &f
	}
	_, err = send(ctx, s.client, r, &mount)
	answer, refused := errors.AsType[*api.ResponseError](err)
	switch {
	case refused && answer.StatusCode == http.StatusForbidden:
		return &Finding{What: r.what, Why: "there is no such mount, or this login's policies grant nothing in it",
			Do: fmt.Sprintf("Look at upstream.vault.mount (%q) and namespace (%q): `vault secrets list` shows the mounts. If it is there, add to the login's policy\n%s",
				u.c.Mount, u.c.Namespace, rules(u.needs("+")))}
	case err == nil && mount.Type != "pki":
		return &Finding{What: r.what, Why: fmt.Sprintf("it is a mount of type %.40q, and pki is needed", mount.Type),
			Do: "Look at upstream.vault.mount: `vault secrets list` shows the mounts"}
	}
	return nil
}

// checkCapabilities asks what the login may do, and names what lacks.
func (u *Upstream) checkCapabilities(ctx context.Context, issuer string) []Finding {
	needs := u.needs(issuer)
	paths := make([]string, len(needs))
	for i, n := range needs {
		paths[i] = n.path
	}
	var granted map[string]json.RawMessage
	r := request{operation: OpLookUp, what: "asking what this login may do", path: "sys/capabilities-self", capability: "update",
		body: map[string][]string{"paths": paths}}
	if _, err := u.call(ctx, r, &granted); err != nil {
		return []Finding{finding(err, true)} // it is granted by the policy `default`, and not needed to sign
	}
	var lacking []need
	for _, n := range needs {
		var has []string
		if json.Unmarshal(granted[n.path], &has) != nil || !slices.Contains(has, n.capability) && !slices.Contains(has, "root") {
			lacking = append(lacking, n)
		}
	}
	if len(lacking) == 0 {
		return nil
	}
	var lacks []string
	for _, n := range lacking {
		lacks = append(lacks, fmt.Sprintf("%q on %s", n.capability, n.path))
	}
	return []Finding{{What: "what this login may do", Why: "its policies lack " + strings.Join(lacks, ", "), Do: "Add to its policy\n" + rules(lacking)}}
}
