package vault

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/vault/api"
)

// kind names the way in which we log in.
func (a AuthConfig) kind() string {
	switch {
	case a.AppRole != nil:
		return "appRole"
	case a.Kubernetes != nil:
		return "kubernetes"
	case a.Cert != nil:
		return "cert"
	}
	return "tokenFile"
}

// granted is what a login gave. A lease of zero has no end.
type granted struct {
	token     secret
	lease     time.Duration
	renewable bool
}

// logIn logs in, with credentials read from their files just now. It returns them too, whatever happened: no text that
// is shown may hold one.
func (a AuthConfig) logIn(ctx context.Context, client *api.Client) (granted, []secret, error) {
	if a.TokenFile != "" {
		return lookUpToken(ctx, client, a.TokenFile)
	}
	var path string
	var files map[string]string // member: file
	body := map[string]string{}
	switch {
	case a.AppRole != nil:
		path, files = a.AppRole.Path, map[string]string{"role_id": a.AppRole.RoleIDFile, "secret_id": a.AppRole.SecretIDFile}
	case a.Kubernetes != nil:
		path, files = a.Kubernetes.Path, map[string]string{"jwt": a.Kubernetes.TokenFile}
		body["role"] = a.Kubernetes.Role
	case a.Cert != nil:
		path = a.Cert.Path
		if a.Cert.Role != "" {
			body["name"] = a.Cert.Role
		}
	}
	var used []secret
	for member, file := range files {
		s, err := readSecret(file)
		if err != nil {
			return granted{}, used, a.fileFault(err)
		}
		used = append(used, s)
		body[member] = s.reveal()
	}
	e, err := send(ctx, client, request{path: "auth/" + path + "/login", body: body}, nil)
	if err != nil {
		return granted{}, used, err
	}
	if e.Auth == nil || e.Auth.ClientToken == "" {
		return granted{}, used, fmt.Errorf("%w: it has no token", errNonsense)
	}
	if e.Auth.MFARequirement != nil {
		return granted{}, used, errors.New("the login wants a second factor, which a machine has not: exempt its role")
	}
	token := newSecret(e.Auth.ClientToken)
	return granted{token, seconds(e.Auth.LeaseDuration), e.Auth.Renewable}, append(used, token), nil
}

// lookUpToken asks what a token of the file is worth.
func lookUpToken(ctx context.Context, client *api.Client, file string) (granted, []secret, error) {
	token, err := readSecret(file)
	if err != nil {
		return granted{}, nil, AuthConfig{TokenFile: file}.fileFault(err)
	}
	used := []secret{token}
	client.SetToken(token.reveal())
	var about struct {
		TTL       int  `json:"ttl"`
		Renewable bool `json:"renewable"`
	}
	if _, err := send(ctx, client, request{path: lookupSelf}, &about); err != nil {
		return granted{}, used, err
	}
	return granted{token, seconds(about.TTL), about.Renewable}, used, nil
}

const (
	lookupSelf = "auth/token/lookup-self"
	renewSelf  = "auth/token/renew-self"
	revokeSelf = "auth/token/revoke-self"
)

func (a AuthConfig) fileFault(err error) error {
	return &Fault{Kind: KindFile, What: "logging in by " + a.kind(), Why: err.Error(),
		Do: "Look at the files that upstream.vault.auth names", cause: err}
}

// loginFault explains why Vault did not let us in.
func (a AuthConfig) loginFault(c Config, err error, used []secret) error {
	r := request{what: "logging in by " + a.kind()}
	err = explain(c, r, err, used...)
	f, ok := errors.AsType[*Fault](err)
	if !ok || f.Kind != KindDenied && f.Kind != KindRejected && f.Kind != KindMissing {
		return err
	}
	f.Kind = KindLogin
	switch {
	case a.AppRole != nil:
		f.Do = fmt.Sprintf("Look whether auth/%s has the role, and whether the secret id has ended or was used up: `vault write -f auth/%s/role/ROLE/secret-id` makes a new one",
			a.AppRole.Path, a.AppRole.Path)
	case a.Kubernetes != nil:
		f.Do = fmt.Sprintf("Look at `vault read auth/%s/role/%s`: it must name our namespace, our service account and the token's audience, and Vault must be able to review tokens",
			a.Kubernetes.Path, a.Kubernetes.Role)
	case a.Cert != nil:
		f.Do = fmt.Sprintf("Look at `vault list auth/%s/certs`: one of them must hold the CA of %s and allow its names", a.Cert.Path, a.Cert.CertFile)
	default:
		f.Do = fmt.Sprintf("The token in %s has ended, was revoked, or may not look itself up (%s, which the policy `default` grants): put a new one there",
			a.TokenFile, lookupSelf)
	}
	return f
}

// seconds bounds what Vault says of a lease.
func seconds(n int) time.Duration {
	const most = 10 * 365 * 24 * 3600
	return time.Duration(min(max(n, 0), most)) * time.Second
}
