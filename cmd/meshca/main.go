// Command meshca is the certificate authority.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "meshca:", err)
		var usage usageError
		if errors.As(err, &usage) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// usageError is a fault of the command line: exit code 2.
type usageError struct{ error }

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "meshca",
		Short:         "A certificate authority and workload identity service for service meshes",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w: see `%s --help`", err, c.CommandPath())}
	})
	root.AddCommand(serveCommand(), devCommand(), rootCommand(), restoreCommand(), unpublishCommand(), configCommand(), &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run:   func(c *cobra.Command, _ []string) { fmt.Fprintln(c.OutOrStdout(), "meshca", version) },
	})
	typed(root)
	return root
}

// typed makes usage errors of what cobra finds wrong with arguments and commands.
func typed(c *cobra.Command) {
	check := c.Args
	if check == nil {
		check = cobra.NoArgs // a group; cobra would show its help for a command that there is not, and call it success
	}
	c.Args = func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			return usageError{fmt.Errorf("%w: see `%s --help`", err, c.CommandPath())}
		}
		return nil
	}
	if !c.Runnable() {
		c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
	}
	for _, sub := range c.Commands() {
		typed(sub)
	}
}

func serveCommand() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Run the certificate authority",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := loadConfig(file)
			if err != nil {
				return err
			}
			return serve(c.Context(), config, os.Stderr)
		},
	}
	configFlag(c, &file)
	return c
}

func configCommand() *cobra.Command {
	group := &cobra.Command{Use: "config", Short: "Work with configuration files"}
	var live bool
	check := &cobra.Command{
		Use:   "check FILE",
		Short: "Say whether a configuration file, and the policy it names, would be accepted",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			config, err := loadConfig(args[0])
			if err != nil {
				return err
			}
			rules, err := config.readPolicy()
			if err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "%s: fine (trust domain %s, %d clusters)\n", args[0], config.trustDomain, len(config.Clusters))
			for _, line := range rules.Describe() {
				fmt.Fprintln(c.OutOrStdout(), "  "+line)
			}
			if live {
				return checkLive(c.Context(), c.OutOrStdout(), config)
			}
			return nil
		},
	}
	check.Flags().BoolVar(&live, "live", false, "try the upstream too: log in at Vault and look whether it could sign")
	group.AddCommand(check)
	return group
}

func rootCommand() *cobra.Command {
	var file string
	group := &cobra.Command{
		Use:   "root",
		Short: "Make or import the root that `upstream.disk` signs with",
		Long: "The root is made once, by one of these commands and never by itself: a CA that has issued under a root would\n" +
			"lock out every agent if it silently got another.",
	}
	var o rootOptions
	create := &cobra.Command{
		Use:   "create --config FILE",
		Short: "Make a root key and certificate where upstream.disk expects them",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := loadConfig(file)
			if err != nil {
				return err
			}
			return createRoot(c.OutOrStdout(), config, o)
		},
	}
	create.Flags().StringVar(&o.name, "common-name", "", "the root's common name (default: the trust domain and \"root\")")
	create.Flags().IntVar(&o.years, "years", 10, "years until the root ends")
	create.Flags().BoolVar(&o.ifMissing, "if-missing", false, "do nothing where the root stands already; for what runs before each start, such as an init container")
	create.Flags().StringVar(&o.published, "published", "", "with --if-missing: a trust bundle that this CA published earlier; where the file is there, the root was lost, and none is made")
	_ = create.MarkFlagFilename("published", "json", "pem")
	configFlag(create, &file)

	var certFile, keyFile string
	imported := &cobra.Command{
		Use:   "import --config FILE --cert FILE --key FILE",
		Short: "Check an existing root and put it where upstream.disk expects it",
		Long:  "Where upstream.disk.keyFile names a key in a PKCS #11 token, that key must be there already, and --key is left out.",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := loadConfig(file)
			if err != nil {
				return err
			}
			return importRoot(c.OutOrStdout(), config, certFile, keyFile)
		},
	}
	imported.Flags().StringVar(&certFile, "cert", "", "the root's certificate, PEM")
	imported.Flags().StringVar(&keyFile, "key", "", "the root's private key, PEM")
	configFlag(imported, &file)
	needs(imported, "config", "cert")
	group.AddCommand(create, imported)
	return group
}

func configFlag(c *cobra.Command, file *string) {
	c.Flags().StringVar(file, "config", "", "configuration file (YAML)")
	needs(c, "config")
	_ = c.MarkFlagFilename("config", "yaml", "yml")
}

// needs refuses a command line that leaves one of these flags out or empty.
func needs(c *cobra.Command, flags ...string) {
	c.PreRunE = func(c *cobra.Command, _ []string) error {
		for _, f := range flags {
			if c.Flags().Lookup(f).Value.String() == "" {
				return usageError{fmt.Errorf("`%s` needs --%s FILE", c.CommandPath(), f)}
			}
		}
		return nil
	}
}
